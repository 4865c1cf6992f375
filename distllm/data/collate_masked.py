"""Texts with hidden tokens to a batch. B examples, S tokens of the longest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distllm.config.schema import TaskConfig
from distllm.data.batch import Batch
from distllm.data.masking import MaskVocabulary, mask_rows
from distllm.data.ragged import Framed


def collate_masked(
    framed: Framed, keys: np.ndarray, *, config: TaskConfig, vocab: MaskVocabulary, sample_ids: Sequence[int]
) -> Batch:
    """Make a batch for masked language modelling; over joined pairs this is translation language modelling
    (Lample and Conneau 2019, arXiv 1901.07291).

    Args:
        framed: the inputs, [B, S].
        keys: what the choice of tokens is a function of, uint64 [B].
        config: how tokens are hidden.
        vocab: of the tokenizer.
        sample_ids: the samples' global numbers; -1 for a padded row.

    Returns:
        A batch with `input_ids`, `attention_mask` and the targets `labels`: the token itself where it is hidden, else IGNORE.
    """
    may = np.arange(framed.ids.shape[1]) < framed.lengths[:, None]
    inputs, labels = mask_rows(framed.ids, keys, config=config, vocab=vocab, may=may)
    given = {"input_ids": torch.from_numpy(inputs), "attention_mask": torch.from_numpy(framed.mask)}
    return Batch(given, {"labels": torch.from_numpy(labels)}, tuple(sample_ids))
