"""Parameters that tp has cut, as plain tensors, for an engine that knows no DTensor; and where the pieces lie in the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from distllm.parallel.packing import Packing
from distllm.parallel.tensor_params import mark_cut
from distllm.pieces import piece_of


@dataclass(frozen=True)
class TensorPiece:
    """Where a tp rank's piece of a parameter lies in the whole one; of a packed one it is several runs."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int
    """The dim that is cut."""
    runs: tuple[tuple[int, int, int], ...]
    """(index in the piece, index in the whole, length) on that dim, in the order of the piece."""

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's piece of a whole tensor."""
        return torch.cat([whole.narrow(self.dim, at, length) for _, at, length in self.runs], dim=self.dim)

    def put(self, piece: torch.Tensor, *, into: torch.Tensor) -> None:
        """Copy the piece to where it lies in a whole tensor."""
        for inside, at, length in self.runs:
            into.narrow(self.dim, at, length).copy_(piece.narrow(self.dim, inside, length))

    def split(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The interval [start, start + length) of the piece's `dim` as intervals of the whole.

        Yields:
            (index in the given interval, index in the whole, length), in order.
        """
        for inside, at, size in self.runs:
            first, last = max(start, inside), min(start + length, inside + size)
            if first < last:
                yield first - start, at + first - inside, last - first


def make_plain(model: nn.Module, *, packed: Mapping[str, Packing]) -> dict[str, TensorPiece]:
    """Put plain tensors in the place of the parameters that `apply_tp` cut; tied ones stay tied.

    Args:
        model: with its weights.
        packed: parameters that hold several matrices, by name.

    Returns:
        For each parameter that is cut, by name, where its piece lies.
    """
    found: dict[str, TensorPiece] = {}
    plain: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            found[name] = _place(parameter, packed.get(name))
            plain[id(parameter)] = nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
            mark_cut(plain[id(parameter)])
    for module in model.modules():
        for key, own in module._parameters.items():
            if own is not None and id(own) in plain:
                module._parameters[key] = plain[id(own)]
    return found


def _place(parameter: DTensor, packing: Packing | None) -> TensorPiece:
    (cut,) = parameter.placements
    assert isinstance(cut, Shard), f"tp alone has cut it, and it is {cut}"
    offsets, sizes = piece_of(parameter)
    start, size, shape = offsets[cut.dim], sizes[cut.dim], tuple(parameter.shape)
    runs = [(0, start, size)] if packing is None else packing.boxes(start, size, whole=shape[cut.dim])
    return TensorPiece(shape, cut.dim, tuple(runs))
