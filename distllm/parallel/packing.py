"""Packed matrices: several matrices in one parameter, each of which is cut over tp.

A fused QKV of width W on `dim` is [Q | K | V]. Cut over t ranks, a rank holds [Q_r | K_r | V_r]: no single box of the whole
tensor, but one for each part. As a DTensor such a parameter is `Shard(dim)` of a permuted whole, in which the ranks' pieces
stand one after another; a `Packing` says where each lies in the true one, so that weights and checkpoints keep the model's
own order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Packing:
    """How a parameter that is cut over tp is packed."""

    dim: int
    """The dim along which the matrices lie side by side, and are cut."""
    parts: int
    """How many equal matrices there are."""
    degree: int
    """The number of tp ranks."""

    def boxes(self, start: int, size: int, *, whole: int) -> list[tuple[int, int, int]]:
        """Where an interval of the permuted order lies in the true one.

        Args:
            start: the first index on `dim`, in the permuted order.
            size: how many.
            whole: the whole tensor's size on `dim`.

        Returns:
            Intervals (offset inside the given one, index in the true order, length), in the permuted order.
        """
        run = whole // (self.parts * self.degree)  # one rank's share of one part
        found, at = [], start
        while at < start + size:
            piece, inside = divmod(at, run)
            rank, part = divmod(piece, self.parts)
            length = min(run - inside, start + size - at)
            found.append((at - start, (part * self.degree + rank) * run + inside, length))
            at += length
        return found

    def unpacked(self, tensor: torch.Tensor) -> torch.Tensor:
        """A whole tensor in the permuted order, brought into the true one."""
        whole = torch.empty_like(tensor)
        for inside, at, length in self.boxes(0, tensor.shape[self.dim], whole=tensor.shape[self.dim]):
            whole.narrow(self.dim, at, length).copy_(tensor.narrow(self.dim, inside, length))
        return whole


def packings(model: nn.Module) -> dict[str, Packing]:
    """The packed parameters of a model by full name: what `apply_tp` left in its modules' `packing`."""
    return {
        f"{path}.{name}" if path else name: packing
        for path, module in model.named_modules()
        for name, packing in getattr(module, "packing", {}).items()
    }
