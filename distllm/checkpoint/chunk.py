"""A chunk: the piece of a global tensor that a rank holds. The only thing a checkpoint knows of a layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from distllm.pieces import piece_of


@dataclass(frozen=True)
class Chunk:
    """This rank's piece of one named global tensor; of a packed one it may have several, under NAME#0, NAME#1, ...

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


def chunk_of(data: torch.Tensor, *, like: torch.Tensor, write: bool) -> Chunk:
    """Describe `data`, a local tensor laid out like the parameter `like`.

    Args:
        data: the local values: of the parameter itself or of an optimizer state with the same local shape.
        like: the parameter, a DTensor or a plain tensor (the same on every rank that holds it).
        write: whether this rank is the first of those that hold the same piece.
    """
    if not isinstance(like, DTensor):
        return Chunk(data, tuple(like.shape), (0,) * like.dim(), write)
    offsets, _ = piece_of(like)
    return Chunk(data, tuple(like.shape), offsets, write and data.numel() > 0)
