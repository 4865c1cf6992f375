"""Where a rank's piece of a tensor lies in the whole, by arithmetic of our own: torch's chunk list is wrong for uneven strided
shards.

FSDP over a tensor that tp has cut on the same dim is a strided shard: tp's cut comes first, FSDP's inside it. Every cut is one
into pieces of ceil(length / ranks), the last ones shorter or empty.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor, Shard

from distllm.parallel.parallelize import Parallel

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
    ranges = [_range(place, dim) for dim in range(place.dim())]
    assert [stop - start for start, stop in ranges] == list(place.to_local().shape), f"{name} is not cut as {place.placements}"
    inside, whole = [slice(0, stop - start) for start, stop in ranges], [slice(*pair) for pair in ranges]
    packing = parallel.packings.get(name)
    if packing is None:
        yield tuple(inside), tuple(whole)
        return
    dim = packing.dim
    first, last = ranges[dim]
    for at, start, length in packing.boxes(first, last - first, whole=place.shape[dim]):
        inside[dim], whole[dim] = slice(at, at + length), slice(start, start + length)
        yield tuple(inside), tuple(whole)


def _range(place: DTensor, dim: int) -> tuple[int, int]:
    """Where this rank's piece begins and ends on one dim."""
    coordinate = place.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not on the parameter's mesh"
    cuts = [(i, placement) for i, placement in enumerate(place.placements) if getattr(placement, "dim", None) == dim]
    plain = [i for i, placement in cuts if type(placement) is Shard]
    strided = [i for i, placement in cuts if type(placement) is not Shard]
    start, stop = 0, place.shape[dim]
    for i in (*plain, *reversed(strided)):
        step = -(-(stop - start) // place.device_mesh.size(i))
        first = min(start + coordinate[i] * step, stop)
        start, stop = first, min(first + step, stop)
    return start, stop
