"""What of the model a rank holds, by arithmetic: its stages, their units, and the numbers that tp, ep and FSDP leave of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from distllm.config.check_pipeline import stage_owners, virtual_stages
from distllm.models.build import meta_model
from distllm.parallel.cut import find_chain
from distllm.parallel.mesh import SHARD_AXES
from distllm.parallel.split import estimated_costs, given_split, split_blocks
from distllm.parallel.tensor import planned
from distllm.parallel.tensor_heads import heads_of
from distllm.parallel.tensor_styles import PARAMETER_STYLES
from distllm.verify.collectives import EXPERT_SHARD_AXES
from distllm.verify.ledger import Step

Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Part:
    """A stage, or the whole model."""

    paths: tuple[str, ...]
    """Of its blocks."""
    blocks: tuple[Parameters, ...]
    rest: Parameters
    """What is outside its blocks: embeddings on the first stage, the last norm and the head on the last."""
    first: bool
    last: bool
    index: int = 0
    """Its place in the order of the forward pass."""

    def ways(self, step: Step) -> Iterator[tuple[bool, bool]]:
        """(cut by tp, spread by ep) of each parameter that learns."""
        for unit in (*self.blocks, self.rest):
            for name, parameter in unit.items():
                if parameter.requires_grad:
                    yield step.sizes["tp"] > 1 and tp_dim(step, name, parameter) is not None, step.is_expert(name)


@dataclass(frozen=True)
class Stages:
    """How a pipeline cuts the model."""

    owners: tuple[int, ...]
    """For each stage the pp rank that holds it."""
    blocks: tuple[range, ...]
    """For each stage its blocks."""
    width: int
    tied: tuple[str, ...]
    """Parameters that the first and the last stage share."""
    front: frozenset[str]
    """Parameters before the first block."""


def stages_of(step: Step) -> Stages | None:
    """The stages of a pipeline, by estimated cost or as the config says; None where there is no pipeline."""
    layout, ranks = step.config.layout, step.sizes["pp"]
    if ranks == 1:
        return None
    model = meta_model(step.spec)
    chain = find_chain(model, spec=step.spec, pp=ranks)
    owners = stage_owners(layout.pp_schedule, pp=ranks, virtual=virtual_stages(layout.pp_schedule, layout.pp_virtual))
    if layout.pp_split:
        blocks = given_split(layout.pp_split, stages=len(owners), blocks=len(chain.blocks))
    else:
        costs = estimated_costs(model, chain=chain, spec=step.spec, seq_len=step.config.data.seq_len)
        blocks = split_blocks(costs, stages=len(owners))
    front = frozenset(n for path in chain.front for n in _named(model.get_submodule(path), path))
    return Stages(tuple(owners), blocks, chain.width, chain.tied, front)


def parts_of(step: Step, stages: Stages | None) -> list[Part]:
    """The parts that this rank holds, in the order of the forward pass."""
    paths = [f"{path}.{name}" for path in step.spec.blocks for name, _ in step.model.get_submodule(path).named_children()]
    own = {path: _named(step.model.get_submodule(path), path) for path in paths}
    inside = {id(p) for block in own.values() for p in block.values()}
    rest = {name: p for name, p in step.model.named_parameters() if id(p) not in inside}
    if stages is None:
        return [Part(tuple(paths), tuple(own.values()), rest, True, True)]
    found, last = [], len(stages.owners) - 1
    for index, (owner, blocks) in enumerate(zip(stages.owners, stages.blocks, strict=True)):
        if owner != step.place["pp"]:
            continue
        here = [paths[i] for i in blocks]
        outside = {
            name: p for name, p in rest.items()
            if (index == 0 and name in stages.front) or (index == last and (name not in stages.front or name in stages.tied))
        }  # fmt: skip
        found.append(Part(tuple(here), tuple(own[path] for path in here), outside, index == 0, index == last, index))
    return found


def _named(module: nn.Module, path: str) -> dict[str, nn.Parameter]:
    return {f"{path}.{name}": p for name, p in module.named_parameters()}


def tp_dim(step: Step, name: str, parameter: nn.Parameter) -> int | None:
    """The dim on which tp cuts a parameter; None where it stays whole."""
    found, _ = planned(step.model, step.spec.tp_plan)
    if name in found:
        return PARAMETER_STYLES[found[name]][0] % parameter.dim()
    for alias, other in step.model.named_parameters(remove_duplicate=False):
        if other is parameter:
            owner, _, key = alias.rpartition(".")
            if owner in found:
                return _dim_of(step, owner, key, found[owner])
    return None


def _dim_of(step: Step, owner: str, key: str, style: str) -> int | None:
    """The dim on which a style cuts a parameter of the module that it names."""
    module = step.model.get_submodule(owner)
    turned = type(module).__name__ == "Conv1D"  # GPT-2's weight is [D, F]
    if style == "embedding_rowwise":
        return 0
    if style == "heads_embedding":
        return 1
    if "colwise" in style:
        heads = heads_of(step.model.get_submodule(owner.rpartition(".")[0])) if style == "colwise" else None
        if heads is not None and heads.shared_key(step.sizes["tp"]) and heads.dim is not None:
            width = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
            if heads.key < heads.query and width == heads.key * heads.dim:
                return None
        return 1 if turned and key == "weight" else 0
    if "rowwise" in style and key == "weight":
        return 0 if turned else 1
    return None


def local_numbers(step: Step, name: str, parameter: nn.Parameter, ranks: int) -> int:
    """Numbers of one rank's shard, padded to equal rows, of what tp and ep leave of a parameter."""
    shape, cut = _before_shards(step, name, parameter, ranks)
    shape[cut] = math.ceil(shape[cut] / ranks)
    return math.prod(shape)


def own_shape(step: Step, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of what this rank holds of a parameter, without padding."""
    ranks, index = 1, 0
    for axis in EXPERT_SHARD_AXES if step.is_expert(name) else SHARD_AXES:
        ranks, index = ranks * step.sizes[axis], index * step.sizes[axis] + step.place[axis]
    shape, cut = _before_shards(step, name, parameter, ranks)
    rows = math.ceil(shape[cut] / ranks)
    shape[cut] = max(0, min(shape[cut], (index + 1) * rows) - index * rows)
    return tuple(shape)


def _before_shards(step: Step, name: str, parameter: nn.Parameter, ranks: int) -> tuple[list[int], int]:
    """The shape that tp and ep leave of a parameter, and the dim on which FSDP then cuts it over so many ranks."""
    shape = list(parameter.shape)
    dim = tp_dim(step, name, parameter) if step.sizes["tp"] > 1 else None
    if dim is not None:  # the last ranks may have less
        width = math.ceil(shape[dim] / step.sizes["tp"])
        start = min(step.place["tp"] * width, shape[dim])
        shape[dim] = min(start + width, shape[dim]) - start
    cut = 0
    if step.is_expert(name):
        shape[0] //= step.sizes["ep"]
        cut = next((d for d in range(1, len(shape)) if shape[d] % ranks == 0), 0)
    return shape, cut
