"""Parameters under tensor parallelism: what is cut is a DTensor on the tp axis, what computes with it sees plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from distllm.parallel.packing import Packing
from distllm.parallel.tensor_random import OwnRandomness

Slot = tuple[nn.Module, str]
"""Where a parameter is registered: the module and the name in it."""


@dataclass
class TensorRanks:
    """The ranks of a tp axis and what they have cut of one model."""

    mesh: DeviceMesh
    """The tp axis alone."""
    sequence_parallel: bool
    loss_parallel: bool
    owners: dict[int, list[Slot]] = field(default_factory=dict)
    """id of a parameter -> every place where it is registered; tied ones have several."""
    handled: set[tuple[int, str]] = field(default_factory=set)
    """(id of a module, name): the places whose module knows how to compute with the cut parameter."""
    random: OwnRandomness | None = None
    """Where the blocks have dropout."""
    partial: list[Slot] = field(default_factory=list)
    """Whole parameters of which each rank makes only a part of the gradient: a norm of each head, keys of few heads."""

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    def follows_sequence(self, module: nn.Module) -> bool:
        """Whether `module` now runs with its residuals cut along the sequence.

        That saves memory which the backward pass needs, so it is done in training; evaluation and generation, whose
        sequences may have any length, keep whole residuals.
        """
        return self.sequence_parallel and module.training

    def begin_own_part(self, module: nn.Module) -> None:
        """From here to `end_own_part` each rank works on features or heads of its own, and so draws its own numbers."""
        if self.random is not None and module.training and not self.sequence_parallel:
            self.random.begin()

    def end_own_part(self, module: nn.Module) -> None:
        """From here on all ranks work on the same again; with cut residuals that is at the end of a block."""
        if self.random is not None and not self.follows_sequence(module):
            self.random.end()

    def register(self, model: nn.Module) -> None:
        """Note where the parameters of a model are, before any is cut."""
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append((module, key))

    def cut(self, module: nn.Module, key: str, *, dim: int, parts: int = 1) -> None:
        """Let each rank hold a piece of a parameter, in all places where it is registered.

        Args:
            module: on meta.
            key: the parameter's name in it; nothing happens where the module has none.
            dim: the dim that is cut into pieces of ceil(length / ranks), the last ones shorter.
            parts: of how many equal matrices the dim is made, each of which is cut; the piece has a part of each, and the
                module's `packing` says so.
        """
        whole = module._parameters.get(key)
        if whole is None:
            return
        dim = dim % whole.dim()
        length = whole.shape[dim]
        assert parts == 1 or length % (parts * self.size) == 0, f"{key}: {length} is not {parts} x {self.size} equal parts"
        if not isinstance(whole, DTensor):
            assert whole.device.type == "meta", "tensor parallelism is applied before a model has memory"
            first, last = piece_range(length, pieces=self.size, index=self.rank)
            shape = [*whole.shape[:dim], last - first, *whole.shape[dim + 1 :]]
            piece = DTensor.from_local(
                torch.empty(shape, dtype=whole.dtype, device="meta"), self.mesh, [Shard(dim)], run_check=False,
                shape=whole.shape, stride=whole.stride(),
            )  # fmt: skip
            new = nn.Parameter(piece, requires_grad=whole.requires_grad)
            places = self.owners.pop(id(whole))
            self.owners[id(new)] = places
            for owner, name in places:
                owner._parameters[name] = new
        if parts > 1:
            vars(module).setdefault("packing", {})[key] = Packing(dim, parts, self.size)
        assert module._parameters[key].placements == (Shard(dim),), f"{key} is cut in two ways"  # type: ignore[union-attr]
        self.handled.add((id(module), key))


def piece_range(length: int, *, pieces: int, index: int) -> tuple[int, int]:
    """Where piece `index` begins and ends, as torch.chunk cuts: pieces of ceil(length / pieces), the last ones shorter."""
    step = -(-length // pieces)
    return min(index * step, length), min((index + 1) * step, length)


def local(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The plain tensor that this rank computes with; gradients flow back to the parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local(grad_placements=parameter.placements)
    return parameter


def weight_of(module: nn.Module, key: str = "weight") -> torch.Tensor:
    """`local` of a parameter that the module has."""
    found = local(module._parameters[key])
    assert found is not None
    return found


@contextmanager
def standing_in(slots: Sequence[Slot], tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let modules compute with `tensors` in place of the parameters that are registered at `slots`."""
    kept = [module._parameters[key] for module, key in slots]
    try:
        for (module, key), tensor in zip(slots, tensors, strict=True):
            module._parameters[key] = tensor  # type: ignore[assignment]
        yield
    finally:
        for (module, key), parameter in zip(slots, kept, strict=True):
            module._parameters[key] = parameter


def is_cut(parameter: torch.Tensor | None) -> bool:
    """Whether ranks hold different pieces of a parameter, as a module computes with it: FSDP has gathered its shards."""
    return isinstance(parameter, DTensor) or getattr(parameter, "tensor_model_parallel", False)


def mark_cut(parameter: nn.Parameter) -> None:
    """Say of a plain parameter that it is a piece, in the word that Megatron and DeepSpeed have for it."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give one module another forward: the instance's shadows the class's, so that no wrapper changes a name."""
    vars(module)["forward"] = forward
