"""Texts and their targets to a batch. B examples, S tokens of the longest text, T of the longest target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distllm.data.batch import IGNORE, Batch
from distllm.data.ragged import Framed, Ragged, rounded, seen


def collate_seq2seq(
    framed: Framed, target: Ragged, *, start: int, end: int, pad: int, limit: int, sample_ids: Sequence[int]
) -> Batch:
    """Make a batch for an encoder-decoder that is given the true target so far (teacher forcing).

    Args:
        framed: the texts with their special tokens, [B, S].
        target: the targets without special tokens, B rows; empty for padded rows.
        start: the token that decoder inputs begin with.
        end: the token that labels end with.
        pad: the token that fills rows up.
        limit: the greatest T.
        sample_ids: the samples' global numbers; -1 for a padded row.

    Returns:
        A batch with `input_ids`, `attention_mask`, `decoder_input_ids` (start, target), `decoder_attention_mask`, and the
        targets `labels` (target, end), IGNORE at padding.
    """
    used = np.asarray(sample_ids) >= 0
    lengths = np.where(used, target.lengths + 1, 0)
    width = rounded(int(lengths.max(initial=0)), limit=limit)
    decoder = np.full((len(lengths), width), pad, dtype=np.int64)
    labels = np.full((len(lengths), width), IGNORE, dtype=np.int64)
    row, column = target.row, target.column
    decoder[used, 0] = start
    decoder[row, column + 1] = target.ids
    labels[row, column] = target.ids
    at = np.flatnonzero(used)
    labels[at, target.lengths[at]] = end
    inputs = {
        "input_ids": framed.ids, "attention_mask": framed.mask,
        "decoder_input_ids": decoder, "decoder_attention_mask": seen(lengths, width),
    }  # fmt: skip
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return Batch(tensors, {"labels": torch.from_numpy(labels)}, tuple(sample_ids))
