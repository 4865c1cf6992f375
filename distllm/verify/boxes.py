"""Where a rank's piece of a parameter lies in the whole: one box, or several where it holds several matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor

from distllm.parallel.parallelize import Parallel
from distllm.pieces import piece_of

Box = tuple[slice, ...]


def boxes(place: torch.Tensor, parallel: Parallel, name: str) -> Iterator[tuple[Box, Box]]:
    """The boxes of this rank's piece: where each is in the piece, and where in the whole tensor.

    Args:
        place: the parameter.
        parallel: knows which parameters hold several matrices; those have several boxes.
        name: the parameter's.
    """
    if not isinstance(place, DTensor):
        box = tuple(slice(0, size) for size in place.shape)
        yield box, box
        return
    offsets, sizes = piece_of(place)
    inside = [slice(0, size) for size in sizes]
    whole = [slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
    packing = parallel.packings.get(name)
    if packing is None:
        yield tuple(inside), tuple(whole)
        return
    dim = packing.dim
    for at, start, length in packing.boxes(offsets[dim], sizes[dim], whole=place.shape[dim]):
        inside[dim], whole[dim] = slice(at, at + length), slice(start, start + length)
        yield tuple(inside), tuple(whole)
