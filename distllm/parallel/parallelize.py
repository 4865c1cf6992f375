"""The order in which parallelisms are applied: the only file that knows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distllm.config.schema import ActivationConfig
from distllm.models.spec import ModelSpec
from distllm.parallel.activation import apply_activation_checkpointing
from distllm.parallel.data import apply_ddp, apply_fsdp
from distllm.parallel.mesh import Mesh


@dataclass(frozen=True)
class Parallel:
    """A model laid out on a mesh, with its weights."""

    model: nn.Module
    """The module with the names of the unwrapped model."""
    forward: nn.Module
    """What to call: the module itself, or DDP around it."""
    mesh: Mesh
    sharded: bool
    """Whether FSDP casts the parameters itself, so that autocast is not needed."""


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, torch.Tensor]],
    device: torch.device,
    compute_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    activation: ActivationConfig | None = None,
    compile_blocks: bool = False,
) -> Parallel:
    """Lay a meta model out on the mesh and give it its weights.

    The order: activation checkpointing, compile, shard, weights, replicate. Checkpointing stands inside compile so
    that the compiler sees it; sharding hooks stand outside, because they break graphs; weights come when every
    rank knows its shards; DDP last, because it looks at real parameters.

    Args:
        model: the whole module on meta, tied.
        mesh: the ranks by axis.
        spec: names the blocks.
        tensors: every parameter and buffer by name, whole, on the CPU; a rank keeps its part of each.
        device: where this rank computes.
        compute_dtype: dtype of the products.
        reshard_after_forward: FSDP's trade of memory for a second gather.
        activation: which blocks are recomputed; None: none.
        compile_blocks: compile each block.
    """
    blocks = find_blocks(model, spec=spec)
    if activation is not None:
        apply_activation_checkpointing(blocks, activation)
    if compile_blocks:
        for block in blocks:
            block.compile()
    apply_fsdp(
        model, mesh, blocks=blocks, compute_dtype=compute_dtype, reshard_after_forward=reshard_after_forward
    )
    fill(model, tensors, device=device)
    return Parallel(model, apply_ddp(model, mesh), mesh, mesh.shards is not None)


def find_blocks(model: nn.Module, *, spec: ModelSpec) -> Sequence[nn.Module]:
    """The blocks of the model in order, by the paths in its spec."""
    return [block for path in spec.blocks for block in model.get_submodule(path).children()]


def fill(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], *, device: torch.device) -> None:
    """Move a meta model to `device` and copy each whole tensor, or this rank's part of it, into its place.

    Args:
        model: on meta; parameters plain or DTensors.
        tensors: name -> whole CPU tensor, for every parameter and buffer (tied ones once).
        device: where the values go.
    """
    tied = _tied_names(model)
    model.to_empty(device=device)
    for name, first in tied.items():  # to_empty gives each name storage of its own
        _replace(model, name, model.get_parameter(first))
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    waiting = set(places)
    with torch.no_grad():
        for name, whole in tensors:
            assert name in waiting, f"the model has no tensor {name}, or it was given twice"
            waiting.remove(name)
            place = places[name]
            if isinstance(place, DTensor):
                local = place.to_local()
                (piece,) = place.__create_chunk_list__()
                box = tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))
                local.copy_(whole[box])
            else:
                place.copy_(whole)
    assert not waiting, f"no values for {sorted(waiting)[:5]}"


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Second and later names of a shared parameter -> its first name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return tied


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)
