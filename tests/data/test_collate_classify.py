from __future__ import annotations

import numpy as np
import torch

from distllm.data.batch import IGNORE
from distllm.data.collate_classify import collate_classify
from distllm.data.ragged import Frame, Framed, empty, ragged

FRAME = Frame(begin=2, separator=3, pad=1)


def framed(*, pair: bool = False, limit: int = 32) -> Framed:
    """Two rows and one of padding."""
    used = np.array([True, True, False])
    second = ragged([[20, 21], [22], []]) if pair else empty(3)
    return FRAME.join(ragged([[10, 11, 12], [13], []]), second, paired=used & pair, used=used, limit=limit)


def test_texts_are_framed_and_padded_to_a_multiple_of_8() -> None:
    batch = collate_classify(framed(), labels=np.array([1, 0, 0]), sample_ids=[4, 5, -1])
    assert batch.inputs.keys() == {"input_ids", "attention_mask"}
    assert batch.inputs["input_ids"].tolist() == [[2, 10, 11, 12, 3, 1, 1, 1], [2, 13, 3, 1, 1, 1, 1, 1], [1] * 8]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 3 + [0] * 5, [1] + [0] * 7]
    assert batch.targets["labels"].tolist() == [1, 0, IGNORE] and batch.sample_ids == (4, 5, -1)
    assert all(t.dtype == torch.int64 for t in (*batch.inputs.values(), *batch.targets.values()))


def test_the_width_is_at_most_the_limit() -> None:
    assert framed(limit=6).ids.shape == (3, 6)


def test_pairs_have_token_types() -> None:
    batch = collate_classify(framed(pair=True), labels=np.array([1, 0, 0]), sample_ids=[4, 5, -1], types=True)
    assert batch.inputs["input_ids"].tolist() == [[2, 10, 11, 12, 3, 20, 21, 3], [2, 13, 3, 22, 3, 1, 1, 1], [1] * 8]
    assert batch.inputs["token_type_ids"].tolist() == [[0] * 5 + [1] * 3, [0] * 3 + [1] * 2 + [0] * 3, [0] * 8]


def test_numbers_have_weights() -> None:
    batch = collate_classify(framed(), labels=np.array([0.5, -2.0, 9.0]), sample_ids=[4, 5, -1])
    assert batch.targets["labels"].tolist() == [0.5, -2.0, 0.0] and batch.targets["weight"].tolist() == [1.0, 1.0, 0.0]
    assert all(t.dtype == torch.float32 for t in batch.targets.values())


def test_windows_name_their_document() -> None:
    batch = collate_classify(framed(), labels=np.array([1, 1, 0]), sample_ids=[4, 5, -1], document=np.array([7, 7, -1]))
    assert batch.targets["document"].tolist() == [7, 7, -1]


def test_without_a_begin_token_the_text_comes_first() -> None:
    used = np.array([True])
    row = Frame(None, 3, 0).join(ragged([[10, 11]]), empty(1), paired=~used, used=used, limit=32)
    assert row.ids[0, :3].tolist() == [10, 11, 3] and row.lengths.tolist() == [3]
