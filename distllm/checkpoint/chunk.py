"""A chunk: the piece of a global tensor that a rank holds. The only thing a checkpoint knows of a layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Chunk:
    """This rank's piece of one named global tensor.

    The piece is the box [offset, offset + data.shape) of a tensor of shape `shape`. Loading fills `data` in place.
    """

    data: torch.Tensor
    """The local values; may be empty when the rank holds nothing."""
    shape: tuple[int, ...]
    """The shape of the global tensor."""
    offset: tuple[int, ...]
    """Where the piece begins, an index for each dim."""
    write: bool
    """Whether this rank is the one, of those that hold the same piece, that writes it."""


def chunk_of(data: torch.Tensor, *, like: torch.Tensor, rank: int) -> Chunk:
    """Describe `data`, a local tensor laid out like the parameter `like`.

    Args:
        data: the local values: of the parameter itself or of an optimizer state with the same local shape.
        like: the parameter, a DTensor or a plain tensor (the same on every rank).
        rank: this rank's number in the world.

    Returns:
        The chunk. Among replicas of a piece, the one at coordinate 0 of every replicated axis writes it.
    """
    if not isinstance(like, DTensor):
        return Chunk(data, tuple(like.shape), (0,) * like.dim(), rank == 0)
    pieces = like.__create_chunk_list__()
    assert len(pieces) == 1, "a parameter has one local piece on each rank"
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not on the parameter's mesh"
    first = all(c == 0 for c, p in zip(coordinate, like.placements, strict=True) if not isinstance(p, Shard))
    return Chunk(data, tuple(like.shape), tuple(pieces[0].offsets), first and data.numel() > 0)
