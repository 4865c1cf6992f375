"""Which boxes of a whole tensor a rank's piece of it holds.

A plain shard is one box. A packed matrix (the thirds of GPT-2's `c_attn`, the halves of `gate_up_proj`) is cut inside of
each part, so a rank's piece of it is several boxes, one after the other: the checkpoint keeps the whole tensor's layout, and
each box has its own place in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard


@dataclass(frozen=True)
class Box:
    """A block of numbers that lies in one place of the whole tensor and in one place of the local piece."""

    offset: tuple[int, ...]
    """Where it begins in the whole tensor, an index for each dim."""
    start: tuple[int, ...]
    """Where it begins in the local piece."""
    sizes: tuple[int, ...]

    def of_whole(self, whole: torch.Tensor) -> torch.Tensor:
        """The box in the whole tensor, a view."""
        return whole[tuple(slice(o, o + n) for o, n in zip(self.offset, self.sizes, strict=True))]

    def of_piece(self, piece: torch.Tensor) -> torch.Tensor:
        """The box in the local piece, a view."""
        return piece[tuple(slice(o, o + n) for o, n in zip(self.start, self.sizes, strict=True))]


def boxes_of(tensor: torch.Tensor) -> tuple[Box, ...]:
    """The boxes that this rank holds; one for a plain tensor, none for an empty piece.

    Args:
        tensor: a DTensor whose placements are Shard, Replicate, or _StridedShard: FSDP's, whose factor is the number of
            pieces that the axes right of it make of the dim, or a packed one, whose factor is the number of parts.
    """
    if not isinstance(tensor, DTensor):
        zeros = (0,) * tensor.dim()
        return (Box(zeros, zeros, tuple(tensor.shape)),)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not on the parameter's mesh"
    ranges: list[list[tuple[int, int]]] = [[(0, n)] for n in tensor.shape]
    cuts = [1] * tensor.dim()
    # From right to left: the innermost axes have cut first, and FSDP, the outermost, cut what they left.
    for axis in reversed(range(tensor.device_mesh.ndim)):
        placement, size = tensor.placements[axis], tensor.device_mesh.size(axis)
        if (dim := sharded_dim(placement, tensor.dim())) is not None:
            parts = placement.split_factor // cuts[dim] if isinstance(placement, _StridedShard) else 1
            ranges[dim] = _cut(ranges[dim], parts=max(int(parts), 1), pieces=size, index=coordinate[axis])
            cuts[dim] *= size
    starts = [_running(dim) for dim in ranges]
    boxes = [
        Box(tuple(r[0] for r, _ in dims), tuple(s for _, s in dims), tuple(r[1] for r, _ in dims))
        for dims in product(*[list(zip(r, s, strict=True)) for r, s in zip(ranges, starts, strict=True)])
    ]
    return tuple(box for box in boxes if all(box.sizes))


def sharded_dim(placement: Placement, dims: int) -> int | None:
    """The dim that a placement cuts, of a tensor with so many dims; None: it cuts none."""
    # In torch 2.13 a _StridedShard is no Shard, in 2.11 it is.
    return placement.dim % dims if isinstance(placement, Shard | _StridedShard) else None


def _cut(ranges: Sequence[tuple[int, int]], *, parts: int, pieces: int, index: int) -> list[tuple[int, int]]:
    """One of `pieces` pieces of each of `parts` equal parts of some ranges (begin, length), put together.

    Lengths as torch.chunk has them: all but the last of ceil(length / pieces).
    """
    length = sum(n for _, n in ranges)
    assert length % parts == 0, f"{length} is not made of {parts} equal parts"
    part = length // parts
    step = -(-part // pieces)
    found: list[tuple[int, int]] = []
    for first in range(0, length or 1, part or 1):
        begin, end = first + min(index * step, part), first + min((index + 1) * step, part)
        at = 0
        for offset, n in ranges:
            low, high = max(begin, at), min(end, at + n)
            if low < high:
                found.append((offset + low - at, high - low))
            at += n
    return found or [(0, 0)]


def _running(ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Where each range begins when they stand one after the other."""
    starts, at = [], 0
    for _, n in ranges:
        starts.append(at)
        at += n
    return starts
