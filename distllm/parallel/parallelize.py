"""The order in which parallelisms are applied: the only file that knows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distllm.comm import gather_over
from distllm.config.check_context import ulysses_problems
from distllm.config.check_pipeline import stage_owners, virtual_stages
from distllm.config.errors import ConfigError
from distllm.config.schedule_csv import owners_of, read_order
from distllm.config.schema import ActivationConfig, LayoutConfig, MoeConfig
from distllm.models.spec import ModelSpec
from distllm.parallel.activation import apply_activation_checkpointing
from distllm.parallel.balance import RouterWatch
from distllm.parallel.context import apply_cp, check_context
from distllm.parallel.cut import find_chain
from distllm.parallel.data import apply_ddp, apply_fsdp
from distllm.parallel.expert import apply_ep, check_experts, expert_modules
from distllm.parallel.mesh import AXES, FLAT, Mesh
from distllm.parallel.packing import Packing, packings
from distllm.parallel.pipeline import Facts, Pipeline
from distllm.parallel.stages import Cut, apply_pp, check_stages, own_blocks
from distllm.parallel.tensor import apply_tp
from distllm.parallel.tensor_check import can_cut_sequence, tp_problems
from distllm.parallel.tensor_heads import heads_of
from distllm.pieces import piece_of


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
    axes: LayoutConfig = field(default_factory=LayoutConfig)
    """How tp, cp and pp work; its sizes are not read."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """The losses of routers."""
    microbatches: int = 1
    """Micro-batches of a step, which a pipeline's schedule from a file is read for."""
    seq_len: int = 1
    """S, which decides what attention costs where a pipeline is balanced."""
    rounded_weights: bool = False
    """Whether the engine rounds the weights to the compute dtype itself, and hidden states with them."""


@dataclass(frozen=True)
class Parallel:
    """A model laid out on a mesh, with its weights."""

    model: nn.Module
    """What this rank holds, under the names of the unwrapped model; of a pipeline its stages, and then not to be called."""
    parts: tuple[nn.Module, ...]
    """The modules that compute: the model, or each of this rank's stages."""
    forward: nn.Module
    """What to call where there is no pipeline: the module itself, or DDP around it."""
    mesh: Mesh
    sharded: bool
    """Whether FSDP casts the parameters itself, so that autocast is not needed."""
    packings: Mapping[str, Packing] = field(default_factory=dict)
    """Parameters that hold several matrices, cut over tp, by name."""
    pipeline: Pipeline | None = None
    copies: frozenset[str] = frozenset()
    """Names of what another pipeline stage holds too and answers for: tied parameters, buffers."""
    watches: tuple[RouterWatch | None, ...] = (None,)
    """For each part what adds its routers' losses; None where none is asked for."""
    layout: Layout = field(default_factory=Layout)

    def writes(self, name: str, like: torch.Tensor) -> bool:
        """Whether this rank is the first of those that hold the same piece of the tensor `name`, laid out like `like`."""
        cut: set[str] = set()
        if isinstance(like, DTensor):
            axes = like.device_mesh.mesh_dim_names or ()
            for axis, placement in zip(axes, like.placements, strict=True):
                if not placement.is_replicate():  # FSDP over tp on one dim makes a strided shard, which is no Shard
                    cut |= set(FLAT.get(axis, (axis,)))
        others = (axis for axis in AXES if axis != "pp" and axis not in cut)
        return name not in self.copies and self.mesh.first_of(*others)


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

    The order: stages, tensor, expert, context, activation checkpointing, compile, shard, weights, replicate. A stage is cut
    from the whole, because only the whole shows that it is a chain. Checkpointing stands inside compile so that the
    compiler sees it; sharding hooks stand outside, because they break graphs; weights come when every rank knows its
    shards; DDP last, because it looks at real parameters.

    Args:
        model: the whole module on meta, tied.
        mesh: the ranks by axis.
        spec: names the blocks.
        tensors: every parameter and buffer by name, whole, on the CPU; a rank keeps its part of each.
        device: where this rank computes.
        layout: how; None: the defaults.

    Raises:
        ConfigError: the model cannot be laid out so; the same on every rank.
    """
    layout = layout or Layout()
    if layout.compute_dtype == torch.float64:
        model = _in_fp64(model)
    refuse_misfits(model, spec=spec, sizes=mesh.sizes, axes=layout.axes, moe=layout.moe)
    balanced = bool(layout.moe.balance or layout.moe.z_loss)  # of whole samples, which a router then must see
    sequence = layout.axes.sequence_parallel and not balanced and can_cut_sequence(model, spec=spec)
    cut = _cut_stages(model, mesh, spec=spec, layout=layout)
    parts = (model,) if cut is None else tuple(stage.module for stage in cut.stages)
    watches = []
    for part in parts:
        apply_tp(part, mesh, spec=spec, sequence_parallel=sequence, loss_parallel=layout.axes.loss_parallel)
        apply_ep(part, mesh, plan=spec.ep_plan)
        apply_cp(part, mesh, method=layout.axes.cp_method)
        watches.append(_watch(part, spec=spec, moe=layout.moe))
    packed: dict[str, Packing] = {}
    for part in parts:
        blocks = own_blocks(part, spec=spec)
        if layout.activation is not None:
            apply_activation_checkpointing(blocks, layout.activation)
        if layout.compile_blocks:
            for block in blocks:
                block.compile()
        packed |= packings(part)
        apply_fsdp(
            part, mesh, blocks=blocks, compute_dtype=layout.compute_dtype,
            reshard_after_forward=layout.reshard_after_forward, experts=_spread_experts(part, mesh, spec=spec),
        )  # fmt: skip
    fill(parts, tensors, device=device, packed=packed, partial=cut is not None)
    sharded = mesh.shards is not None
    if cut is None:
        return Parallel(model, parts, apply_ddp(model, mesh), mesh, sharded, packed, watches=tuple(watches), layout=layout)
    pipeline = _pipeline(cut, mesh, spec=spec, layout=layout, device=device)
    copies = frozenset(name for name in cut.chain.tied if not cut.counts_in_norm(name)) | _other_stages_buffers(cut, mesh)
    return Parallel(cut.model, parts, cut.model, mesh, sharded, packed, pipeline, copies, tuple(watches), layout)


def refuse_misfits(
    model: nn.Module, *, spec: ModelSpec, sizes: Mapping[str, int], axes: LayoutConfig, moe: MoeConfig
) -> None:
    """Refuse axes that do not fit the model, before it is cut.

    Args:
        model: the whole module on meta.
        spec: its plans.
        sizes: of the mesh axes.
        axes: how cp and pp work; its sizes are not read.
        moe: the losses of routers.

    Raises:
        ConfigError: a line each.
    """
    if problems := tp_problems(model, spec=spec, size=sizes["tp"]):
        raise ConfigError(problems)
    check_experts(model, plan=spec.ep_plan, ep=sizes["ep"], tp=sizes["tp"], moe=moe)
    if (cp := sizes["cp"]) > 1:
        check_context(model, cp=cp)
        heads = {found.query for module in model.modules() if (found := heads_of(module))}
        spread = sorted(heads) if axes.cp_method == "ulysses" else []
        if problems := [line for count in spread for line in ulysses_problems(count, cp=cp, tp=sizes["tp"])]:
            raise ConfigError(problems[:1])
    if (pp := sizes["pp"]) > 1:
        stages = None if axes.pp_schedule == "csv" else pp * virtual_stages(axes.pp_schedule, axes.pp_virtual)
        check_stages(find_chain(model, spec=spec, pp=pp), pp=pp, stages=stages, family=spec.name)


def _in_fp64(model: nn.Module) -> nn.Module:
    choose = getattr(model, "set_experts_implementation", None)
    if callable(choose):
        choose("eager")  # transformers' default is torch's grouped product, which knows no fp64
    return model.double()


def _cut_stages(model: nn.Module, mesh: Mesh, *, spec: ModelSpec, layout: Layout) -> Cut | None:
    """This rank's stages; None without a pipeline."""
    pp, axes = mesh.sizes["pp"], layout.axes
    if pp == 1:
        return None
    if axes.pp_csv is not None:
        owners = owners_of(read_order(Path(axes.pp_csv), pp=pp, microbatches=layout.microbatches))
    else:
        owners = stage_owners(axes.pp_schedule, pp=pp, virtual=virtual_stages(axes.pp_schedule, axes.pp_virtual))
    return apply_pp(
        model, rank=mesh.coordinates()["pp"], owners=owners, spec=spec, seq_len=layout.seq_len, split=axes.pp_split
    )


def _pipeline(cut: Cut, mesh: Mesh, *, spec: ModelSpec, layout: Layout, device: torch.device) -> Pipeline:
    # Autocast leaves the residual stream in fp32; FSDP's casts make it the compute dtype.
    low = layout.compute_dtype not in (torch.float32, torch.float64)
    autocast = low and mesh.shards is None and not layout.rounded_weights
    travels = torch.float32 if autocast else layout.compute_dtype
    facts = Facts(
        layout.axes.pp_schedule, cut.owners, cut.chain.width, travels, csv=layout.axes.pp_csv, tied=cut.chain.tied,
        pad_id=spec.pad_id or 0,
    )  # fmt: skip
    group = mesh.group("pp")
    assert group is not None
    return Pipeline(cut.stages, facts=facts, group=group, device=device)


def _other_stages_buffers(cut: Cut, mesh: Mesh) -> frozenset[str]:
    """The buffers of this rank that a rank of an earlier place on the pp axis has too: a checkpoint takes them from there."""
    mine = {name for name, _ in cut.model.named_buffers()}
    everyone: Sequence[set[str]] = gather_over(mine, mesh.group("pp"))
    return frozenset(mine & set().union(*everyone[: mesh.coordinates()["pp"]]))


def _watch(part: nn.Module, *, spec: ModelSpec, moe: MoeConfig) -> RouterWatch | None:
    if not (moe.balance or moe.z_loss):
        return None
    return RouterWatch(part, experts=expert_modules(part, plan=spec.ep_plan), moe=moe)


def _spread_experts(part: nn.Module, mesh: Mesh, *, spec: ModelSpec) -> Sequence[nn.Module]:
    """The modules of experts that FSDP lays out apart, because ep has spread them."""
    return list(expert_modules(part, plan=spec.ep_plan).values()) if mesh.sizes["ep"] > 1 else []


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
    offsets, sizes = piece_of(place)
    box = [slice(o, o + s) for o, s in zip(offsets, sizes, strict=True)]
    if packing is None:
        local.copy_(whole[tuple(box)])
        return
    dim = packing.dim
    for inside, at, length in packing.boxes(offsets[dim], sizes[dim], whole=whole.shape[dim]):
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
