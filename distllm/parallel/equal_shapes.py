"""Micro-batches of one step brought to one shape: a pipeline's buffers have one for all of them.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from distllm.data.batch import IGNORE, Batch


def equal_shapes(batches: Sequence[Batch], *, pad_id: int) -> Sequence[Batch]:
    """Pad micro-batches on the right and below to the largest [B, S] among them; the padding has no weight in the loss.

    Args:
        batches: of a step. Most have one shape, and then they are returned as they are.
        pad_id: the id that the model takes for padding; 0 for one that knows none.
    """
    shapes = [batch.inputs["input_ids"].shape for batch in batches]
    rows, columns = (max(shape[dim] for shape in shapes) for dim in (0, 1))
    return [
        batch if shape == (rows, columns) else _padded(batch, rows - shape[0], columns - shape[1], pad_id)
        for batch, shape in zip(batches, shapes, strict=True)
    ]


def _padded(batch: Batch, rows: int, columns: int, pad_id: int) -> Batch:
    fill = {"input_ids": pad_id}
    inputs = {name: _input(value, rows, columns, fill.get(name, 0)) for name, value in batch.inputs.items()}
    targets = {name: _target(value, rows, columns) for name, value in batch.targets.items()}
    return Batch(inputs, targets, (*batch.sample_ids, *[-1] * rows))


def _input(value: torch.Tensor, rows: int, columns: int, fill: int) -> torch.Tensor:
    """Causal attention does not see what is behind the end, and a mask [B, S] leaves it out. A padding token of a mask
    [B, 1, S, S] sees itself, because a softmax over nothing is not a number. Rows below repeat the first."""
    wide = F.pad(value, (0, columns) * (2 if value.dim() == 4 else 1), value=fill)
    if value.dim() == 4 and columns:
        new = torch.arange(wide.shape[-1] - columns, wide.shape[-1], device=value.device)
        wide[:, :, new, new] = True
    return torch.cat([wide, wide[:1].expand(rows, *wide.shape[1:])]) if rows else wide


def _target(value: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    assert not value.dtype.is_floating_point or not rows, "numbers have no value that is left out"
    wide = F.pad(value, (0, columns), value=IGNORE) if value.dim() > 1 else value
    return F.pad(wide, (*[0] * (2 * wide.dim() - 1), rows), value=IGNORE)
