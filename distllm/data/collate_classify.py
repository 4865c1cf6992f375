"""Labelled texts to a batch. B examples, S tokens of the longest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distllm.data.batch import IGNORE, Batch
from distllm.data.ragged import Framed


def collate_classify(
    framed: Framed, *, labels: np.ndarray, sample_ids: Sequence[int], types: bool = False, document: np.ndarray | None = None
) -> Batch:
    """Make a batch for classification (int64 labels) or regression (float64 labels).

    Args:
        framed: the inputs, [B, S].
        labels: class numbers int64 [B] or values float64 [B]; those of padded rows are not read.
        sample_ids: the samples' global numbers; -1 for a padded row.
        types: whether the model takes token types (0 in the first text, 1 in the second).
        document: the example that each row is a window of, int64 [B]; None: rows are whole examples.

    Returns:
        A batch with `input_ids`, `attention_mask` and, if asked for, `token_type_ids`; targets `labels`: int64 with IGNORE for
        padded rows, or float32 with a `weight` of 0 for them; and `document`.
    """
    used = np.asarray(sample_ids) >= 0
    targets = labels_of(labels, used)
    if document is not None:
        targets["document"] = torch.from_numpy(document)
    return Batch(inputs_of(framed, types=types), targets, tuple(sample_ids))


def inputs_of(framed: Framed, *, types: bool) -> dict[str, torch.Tensor]:
    """The inputs of an encoder: ids, mask and, if asked for, token types."""
    inputs = {"input_ids": torch.from_numpy(framed.ids), "attention_mask": torch.from_numpy(framed.mask)}
    if types:
        at = np.arange(framed.ids.shape[1])
        second = (at >= framed.second[:, None]) & (at < framed.lengths[:, None])
        inputs["token_type_ids"] = torch.from_numpy(second.astype(np.int64))
    return inputs


def labels_of(labels: np.ndarray, used: np.ndarray) -> dict[str, torch.Tensor]:
    """Labels and, for numbers, weights; rows that are not `used`, bool [B], have no weight."""
    if np.issubdtype(labels.dtype, np.floating):
        values = np.where(used, labels, 0.0).astype(np.float32)
        return {"labels": torch.from_numpy(values), "weight": torch.from_numpy(used.astype(np.float32))}
    return {"labels": torch.from_numpy(np.where(used, labels, IGNORE).astype(np.int64))}
