from __future__ import annotations

import numpy as np
import torch

from distllm.data.batch import IGNORE
from distllm.data.collate_seq2seq import collate_seq2seq
from distllm.data.ragged import Frame, empty, ragged


def test_targets_are_shifted_by_the_start_token() -> None:
    used = np.array([True, True, False])
    framed = Frame(None, 3, 1).join(ragged([[10, 11], [12], []]), empty(3), paired=used & False, used=used, limit=32)
    target = ragged([[20, 21, 22], [], []])
    batch = collate_seq2seq(framed, target, start=5, end=0, pad=1, limit=32, sample_ids=[7, 8, -1])
    assert batch.inputs["input_ids"][:, :4].tolist() == [[10, 11, 3, 1], [12, 3, 1, 1], [1, 1, 1, 1]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[5, 20, 21, 22, 1, 1, 1, 1], [5] + [1] * 7, [1] * 8]
    i = IGNORE
    assert batch.targets["labels"].tolist() == [[20, 21, 22, 0, i, i, i, i], [0] + [i] * 7, [i] * 8]
    assert batch.inputs["decoder_attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] + [0] * 7, [1] + [0] * 7]
    assert batch.inputs["attention_mask"][:, :4].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert all(t.dtype == torch.int64 for t in (*batch.inputs.values(), *batch.targets.values()))
