"""What this rank holds of the parameters, as plain tensors.

The optimizer and the gradient norm work on local shards and never see a DTensor. That makes them fast (no dispatch for
every parameter), equal for every layout, and free to mix parameters that lie on different meshes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from distllm.parallel.loss import at_least_fp32

LONG_ROW = 1 << 16
"""Values of a row whose squares a CPU adds in fp64."""


class LocalParameters:
    """The local part of every trainable parameter, by name, sharing memory with it."""

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, nn.Parameter]],
        *,
        stages: dist.ProcessGroup | None = None,
        copies: Collection[str] = (),
    ) -> None:
        """Args:
        model: what this rank trains, or its parameters by name.
        stages: the ranks that hold the other stages; None: this rank holds the whole model.
        copies: names of parameters that another stage has too and counts (tied ones).
        """
        self._stages, self._copies = stages, frozenset(copies)
        named = model.named_parameters() if isinstance(model, nn.Module) else model
        self.whole = {name: p for name, p in named if p.requires_grad}
        self.local = {
            name: nn.Parameter(local_part(p)) if isinstance(p, DTensor) else p for name, p in self.whole.items()
        }

    def refresh(self) -> None:
        """Point every local parameter at the present shard and its gradient; call after backward.

        FSDP may move a shard to padded memory at its first forward, and makes a new gradient each step.
        """
        for name, whole in self.whole.items():
            if isinstance(whole, DTensor):
                local = self.local[name]
                local.data = local_part(whole)
                local.grad = None if whole.grad is None else local_part(whole.grad)

    def gradients(self) -> list[torch.Tensor]:
        """The local gradients that exist; after `refresh`."""
        return [p.grad for p in self.local.values() if p.grad is not None]

    def clear_gradients(self) -> None:
        """Forget the gradients of both views."""
        for name, whole in self.whole.items():
            whole.grad = None
            self.local[name].grad = None

    def squared_norm(self) -> torch.Tensor:
        """The squared norm of the whole gradient, a scalar, equal on all ranks.

        A sharded parameter's squares are added over the axes that shard it; a replicated one counts once, and so does a
        tied one that two stages have. Then the stages are added.
        """
        groups: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
        for name, whole in self.whole.items():
            gradient = self.local[name].grad
            if gradient is not None and name not in self._copies:
                groups.setdefault(_sharding_groups(whole), []).append(gradient)
        total: torch.Tensor | None = None
        for over, gradients in groups.items():
            square = squared_norm_of(gradients)
            for group in over:  # each axis adds the shards along it
                dist.all_reduce(square, group=group)
            total = square if total is None else total + square
        assert total is not None, "no parameter has a gradient"
        if self._stages is not None:
            dist.all_reduce(total, group=self._stages)  # each stage has parameters of its own
        return total


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's values of a tensor, detached and sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def squared_norm_of(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all values of some tensors on one device, a scalar in fp32, or fp64 where they are."""
    tensors = list(tensors)
    if tensors[0].device.type == "cpu":
        total = torch.cat([_row_norms(torch.atleast_1d(tensor)) for tensor in tensors]).double().square().sum()
    else:
        total = torch.stack([at_least_fp32(norm) for norm in torch._foreach_norm(tensors)]).square().sum()
    return total if tensors[0].dtype == torch.float64 else total.float()


def _row_norms(tensor: torch.Tensor) -> torch.Tensor:
    """The norms of a tensor's rows [N].

    A CPU adds the squares of a row one after another: in fp32 a million of them lose two digits, and another number where the
    tensor is cut (GPUs add in trees). Rows are short, and few are not: these alone are worth fp64, three times as slow.
    """
    wide = torch.float64 if tensor.shape[-1] > LONG_ROW else torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=-1, dtype=wide).flatten()


def _sharding_groups(parameter: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    # Not "is a Shard": FSDP over tp on one dim makes a strided shard, which torch counts as another kind.
    return tuple(mesh.get_group(i) for i, p in enumerate(parameter.placements) if not p.is_replicate())
