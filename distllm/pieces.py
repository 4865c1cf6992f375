"""Which piece of a whole tensor a rank holds, by arithmetic of our own.

torch's `__create_chunk_list__` is wrong for uneven strided shards (2.13): of 257 rows that tp has cut in 2 and FSDP in 4, it
gives sizes that the local tensor does not have. A strided shard stands for a cut inside another one: tp's comes first. Every cut
is one into pieces of ceil(length / ranks), the last ones shorter or empty.
"""

from __future__ import annotations

from torch.distributed.tensor import DTensor, Shard


def piece_of(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this rank's piece begins in the whole, and its sizes: each a number a dim."""
    ranges = [_range(tensor, dim) for dim in range(tensor.dim())]
    sizes = tuple(stop - start for start, stop in ranges)
    assert sizes == tuple(tensor.to_local().shape), f"{tuple(tensor.to_local().shape)} is not cut as {tensor.placements}"
    return tuple(start for start, _ in ranges), sizes


def _range(tensor: DTensor, dim: int) -> tuple[int, int]:
    """Where this rank's piece begins and ends on one dim."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not on the tensor's mesh"
    cuts = [(i, placement) for i, placement in enumerate(tensor.placements) if getattr(placement, "dim", None) == dim]
    plain = [i for i, placement in cuts if type(placement) is Shard]
    strided = [i for i, placement in cuts if type(placement) is not Shard]
    start, stop = 0, tensor.shape[dim]
    for i in (*plain, *reversed(strided)):
        step = -(-(stop - start) // tensor.device_mesh.size(i))
        first = min(start + coordinate[i] * step, stop)
        start, stop = first, min(first + step, stop)
    return start, stop
