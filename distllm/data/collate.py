"""Rows of tokens to a batch. B samples, S tokens of a sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distllm.data.batch import IGNORE, Batch


def collate(
    rows: np.ndarray, *, sample_ids: Sequence[int], begins: np.ndarray | None = None, labelled: np.ndarray | None = None
) -> Batch:
    """Make a batch for next-token prediction.

    Args:
        rows: int64 [B, S + 1], each sample and the token after it.
        sample_ids: the samples' global numbers; -1 for a padded row.
        begins: bool [B, S + 1], where a document begins; then attention and labels stay inside documents. None: they
            cross them.
        labelled: int64 [B], how many labels of each row count, the rest is padding; None: all.

    Returns:
        A batch with `input_ids`, `labels` and, given `begins`, `position_ids` and `attention_mask`.
    """
    tokens, labels = rows[:, :-1].copy(), rows[:, 1:].copy()  # apart, because labels are overwritten below
    inputs = {"input_ids": torch.from_numpy(tokens)}
    if begins is not None:
        labels[begins[:, 1:]] = IGNORE
        positions, mask = inside_documents(begins[:, :-1])
        inputs |= {"position_ids": torch.from_numpy(positions), "attention_mask": torch.from_numpy(mask)}
    if labelled is not None:
        labels[np.arange(labels.shape[1]) >= labelled[:, None]] = IGNORE
    return Batch(inputs, {"labels": torch.from_numpy(labels)}, tuple(sample_ids))


def part_of(batch: Batch, first: int, last: int) -> Batch:
    """The rows [first, last) of a batch, views of it."""
    return Batch(
        {name: tensor[first:last] for name, tensor in batch.inputs.items()},
        {name: tensor[first:last] for name, tensor in batch.targets.items()},
        batch.sample_ids[first:last],
    )


def inside_documents(begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and mask of attention that does not cross documents.

    Args:
        begins: bool [B, S], where a document begins; a row's first token counts as a beginning in any case.

    Returns:
        Positions from 0 in each document, int64 [B, S]; the mask, bool [B, 1, S, S]: True where query (dim 2) may look at
        key (dim 3).
    """
    at = np.arange(begins.shape[1], dtype=np.int32)  # S x S comparisons: int32 takes half the time of int64
    start = np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    # A key is seen if it is not after the query and not before the start of the query's document.
    mask = at >= start[:, :, None]
    mask &= at <= at[:, None]
    return (at - start).astype(np.int64), mask[:, None]


def pinned(batch: Batch) -> Batch:
    """The same batch in page-locked memory, from which a copy to the GPU runs beside the computation."""
    return Batch(
        {k: v.pin_memory() for k, v in batch.inputs.items()},
        {k: v.pin_memory() for k, v in batch.targets.items()},
        batch.sample_ids,
    )
