"""Micro-batches of one step brought to one shape: a pipeline's buffers have one for all of them.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from distllm.data.batch import IGNORE, Batch


def equal_shapes(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Pad micro-batches on the right and below to the largest [B, S] among them; the padding has no weight in the loss.

    Args:
        batches: of a step. Most have one shape, and then they are returned as they are.
    """
    shapes = [batch.inputs["input_ids"].shape for batch in batches]
    rows, columns = (max(shape[dim] for shape in shapes) for dim in (0, 1))
    return [
        batch if shape == (rows, columns) else _padded(batch, rows - shape[0], columns - shape[1])
        for batch, shape in zip(batches, shapes, strict=True)
    ]


def _padded(batch: Batch, rows: int, columns: int) -> Batch:
    inputs = {name: _input(name, value, rows, columns) for name, value in batch.inputs.items()}
    targets = {name: _target(value, rows, columns) for name, value in batch.targets.items()}
    return Batch(inputs, targets, (*batch.sample_ids, *[-1] * rows))


def _input(name: str, value: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Tokens behind the end are 0: causal attention does not see them, a mask [B, S] leaves them out. A padding token of a
    mask [B, 1, S, S] sees itself, because a softmax over nothing is not a number. Rows below repeat the first."""
    dims = 2 if value.dim() == 4 else 1
    wide = F.pad(value, (0, columns) * dims)
    if value.dim() == 4 and columns:
        seen = torch.arange(wide.shape[-1] - columns, wide.shape[-1], device=value.device)
        wide[:, :, seen, seen] = True
    return torch.cat([wide, wide[:1].expand(rows, *wide.shape[1:])]) if rows else wide


def _target(value: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    assert not value.dtype.is_floating_point or not rows, "numbers have no value that is left out"
    wide = F.pad(value, (0, columns), value=IGNORE) if value.dim() > 1 else value
    return F.pad(wide, (*[0] * (2 * wide.dim() - 1), rows), value=IGNORE)
