"""The order in which parallelisms are applied: the only file that knows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distllm.config.schema import ActivationConfig
from distllm.models.spec import ModelSpec
from distllm.parallel.activation import apply_activation_checkpointing
from distllm.parallel.data import apply_ddp, apply_fsdp
from distllm.parallel.mesh import AXES, FLAT, Mesh
from distllm.parallel.packing import Packing, packings


@dataclass(frozen=True)
class Layout:
    """How a model is laid out, besides the sizes of the mesh axes."""

    compute_dtype: torch.dtype = torch.float32
    """The dtype of the products; fp64 also keeps the weights in fp64."""
    reshard_after_forward: bool = True
    """FSDP's trade of memory for a second gather."""
    activation: ActivationConfig | None = None
    """Which blocks are recomputed; None: none."""
    compile_blocks: bool = False
    """Compile each block."""
    sequence_parallel: bool = True
    loss_parallel: bool = True
    cp_method: str = "auto"


@dataclass(frozen=True)
class Parallel:
    """A model laid out on a mesh, with its weights."""

    parts: tuple[nn.Module, ...]
    """What this rank trains, with the names of the unwrapped model: the model, or its stages of a pipeline."""
    forward: nn.Module
    """What to call where there is no pipeline: the module itself, or DDP around it."""
    mesh: Mesh
    sharded: bool
    """Whether FSDP casts the parameters itself, so that autocast is not needed."""
    packings: Mapping[str, Packing]
    """Parameters that hold several matrices, cut over tp, by name."""

    @property
    def model(self) -> nn.Module:
        """The model, where this rank holds it in one part."""
        (part,) = self.parts
        return part

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by the names of the unwrapped model, tied ones once."""
        return (pair for part in self.parts for pair in part.named_parameters())

    def writes(self, name: str, like: torch.Tensor) -> bool:
        """Whether this rank is the first of those that hold the same piece of the tensor `name`, laid out like `like`."""
        cut: set[str] = set()
        if isinstance(like, DTensor):
            axes = like.device_mesh.mesh_dim_names or ()
            for axis, placement in zip(axes, like.placements, strict=True):
                if not placement.is_replicate():  # FSDP over tp on one dim makes a strided shard, which is no Shard
                    cut |= set(FLAT.get(axis, (axis,)))
        return self.mesh.first_of(*(axis for axis in AXES if axis != "pp" and axis not in cut))

    def named_buffers(self, *, persistent: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's buffers, or those of them that a checkpoint keeps; one that several stages have comes once."""
        seen: set[str] = set()
        for part in self.parts:
            kept = part.state_dict(keep_vars=True).keys() if persistent else None
            for name, buffer in part.named_buffers():
                if name not in seen and (kept is None or name in kept):
                    seen.add(name)
                    yield name, buffer


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, torch.Tensor]],
    device: torch.device,
    layout: Layout | None = None,
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
        layout: how; None: the defaults.
    """
    layout = layout or Layout()
    if layout.compute_dtype == torch.float64:
        model = model.double()
    blocks = find_blocks(model, spec=spec)
    if layout.activation is not None:
        apply_activation_checkpointing(blocks, layout.activation)
    if layout.compile_blocks:
        for block in blocks:
            block.compile()
    packed = packings(model)
    apply_fsdp(
        model, mesh, blocks=blocks, compute_dtype=layout.compute_dtype, reshard_after_forward=layout.reshard_after_forward
    )
    fill(model, tensors, device=device, packed=packed)
    return Parallel((model,), apply_ddp(model, mesh), mesh, mesh.shards is not None, packed)


def find_blocks(model: nn.Module, *, spec: ModelSpec) -> Sequence[nn.Module]:
    """The blocks of the model in order, by the paths in its spec."""
    return [block for path in spec.blocks for block in model.get_submodule(path).children()]


def fill(
    parts: nn.Module | Sequence[nn.Module],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    device: torch.device,
    packed: Mapping[str, Packing] | None = None,
    partial: bool = False,
) -> None:
    """Move meta modules to `device` and copy each whole tensor, or this rank's part of it, into its place.

    Args:
        parts: a module, or several, on meta; parameters plain or DTensors.
        tensors: name -> whole CPU tensor, for every parameter and buffer (tied ones once).
        device: where the values go.
        packed: parameters that hold several matrices, cut over tp.
        partial: whether the parts are stages, so that tensors of others come along.
    """
    places: dict[str, list[torch.Tensor]] = {}
    for part in [parts] if isinstance(parts, nn.Module) else parts:
        tied = _tied_names(part)
        part.to_empty(device=device)
        for name, first in tied.items():  # to_empty gives each name storage of its own
            _replace(part, name, part.get_parameter(first))
        for name, place in [*part.named_parameters(), *part.named_buffers()]:
            places.setdefault(name, []).append(place)
    waiting = set(places)
    with torch.no_grad():
        for name, whole in tensors:
            if partial and name not in places:
                continue
            assert name in waiting, f"the model has no tensor {name}, or it was given twice"
            waiting.remove(name)
            for place in places[name]:
                _copy_part(place, whole, packing=(packed or {}).get(name))
    assert not waiting, f"no values for {sorted(waiting)[:5]}"


def _copy_part(place: torch.Tensor, whole: torch.Tensor, *, packing: Packing | None) -> None:
    """Copy this rank's part of a whole tensor into its place."""
    if not isinstance(place, DTensor):
        place.copy_(whole)
        return
    local = place.to_local()
    (piece,) = place.__create_chunk_list__()
    box = [slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True)]
    if packing is None:
        local.copy_(whole[tuple(box)])
        return
    dim = packing.dim
    for inside, at, length in packing.boxes(piece.offsets[dim], piece.sizes[dim], whole=whole.shape[dim]):
        box[dim] = slice(at, at + length)
        local.narrow(dim, inside, length).copy_(whole[tuple(box)])


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
