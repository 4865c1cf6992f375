"""The stages of one pp rank: which they are, cut from the whole module, and as one module for everything that goes by names."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from distllm.config.errors import ConfigError
from distllm.models.spec import ModelSpec
from distllm.parallel.cut import Chain, Foreign, Slot, Stage, apply_cut, find_chain
from distllm.parallel.split import Costs, estimated_costs, given_split, split_blocks


@dataclass(frozen=True)
class Cut:
    """A model cut for one pp rank."""

    stages: tuple[Stage, ...]
    """This rank's, in the order of the forward pass."""
    model: nn.Module
    """All of them as one module, under the names of the whole: for optimizers, norms and checkpoints. Not to be called."""
    chain: Chain
    owners: tuple[int, ...]
    """For each stage the pp rank that holds it."""
    blocks: tuple[range, ...]
    """For each stage its blocks."""

    def counts_in_norm(self, name: str) -> bool:
        """Whether this rank adds a parameter to the norm: of the two holders of a tied one, the first stage's rank does."""
        return name not in self.chain.tied or self.stages[0].index == 0


def apply_pp(
    model: nn.Module,
    *,
    rank: int,
    owners: Sequence[int],
    spec: ModelSpec,
    seq_len: int,
    split: Sequence[int] = (),
    costs: Costs | None = None,
) -> Cut:
    """Cut this rank's stages from the whole module.

    Args:
        model: the whole module on meta, tied; with one stage a rank it is cut in place, else copies of it are.
        rank: this rank's place on the pp axis.
        owners: for each stage the pp rank that holds it (`stage_owners`).
        spec: names the blocks.
        seq_len: S, which decides what attention costs beside the head.
        split: blocks per stage, in the order of the forward pass; empty: balanced by cost.
        costs: measured ones, the same on every rank; None: estimated ones.

    Raises:
        ConfigError: a model that cannot be cut, or a split that does not fit it; the same on every rank.
    """
    pp = max(owners) + 1
    chain = find_chain(model, spec=spec, pp=pp)
    stages, most = len(owners), len(chain.blocks)
    check_stages(chain, pp=pp, stages=stages, family=spec.name)
    if split:
        blocks = given_split(split, stages=stages, blocks=most)
    else:
        costs = costs or estimated_costs(model, chain=chain, spec=spec, seq_len=seq_len)
        blocks = split_blocks(costs, stages=stages)
    mine = [index for index, owner in enumerate(owners) if owner == rank]
    modules = [model, *(copy.deepcopy(model) for _ in mine[1:])]
    cut = tuple(
        apply_cut(module, chain=chain, blocks=blocks[index], index=index, slot=Slot())
        for module, index in zip(modules, mine, strict=True)
    )
    whole = model if len(cut) == 1 else StageModules([stage.module for stage in cut])
    return Cut(cut, whole, chain, tuple(owners), blocks)


def check_stages(chain: Chain, *, pp: int, stages: int | None, family: str) -> None:
    """Refuse more stages than the model has blocks.

    Args:
        chain: the blocks.
        pp: pipeline ranks.
        stages: of all ranks; None where only a file says how many.
        family: what to call the model.

    Raises:
        ConfigError: names the most ranks that have enough.
    """
    most = len(chain.blocks)
    if stages is not None and stages > most:
        rule = f"{stages} stages need a block each, and {family} has {most}"
        raise ConfigError([f"layout.pp={pp}: {rule}; nearest: {max(1, most // (stages // pp))}"])


def own_blocks(module: nn.Module, *, spec: ModelSpec) -> list[nn.Module]:
    """The blocks of a stage that are its own, in order; of a whole model all."""
    lists = [module.get_submodule(path) for path in spec.blocks]
    return [block for blocks in lists for block in blocks.children() if not isinstance(block, Foreign)]


class StageModules(nn.Module):
    """Several stages of one rank under the names that their parameters have in the whole model.

    Of what two stages hold under one name, a tied parameter or a buffer that is computed, the first one's is named.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        for stage in self.stages:
            yield from stage.named_modules(memo, prefix, remove_duplicate)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from _first(stage.named_parameters(prefix, recurse, remove_duplicate) for stage in self.stages)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield from (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, Any]]:
        yield from _first(stage.named_buffers(prefix, recurse, remove_duplicate) for stage in self.stages)

    def state_dict(self, *, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # type: ignore[override]
        found: dict[str, Any] = {}
        for stage in reversed(self.stages):
            found |= stage.state_dict(prefix=prefix, keep_vars=keep_vars)
        return found

    def get_submodule(self, target: str) -> nn.Module:
        for stage in self.stages:  # a stand-in has nothing below it
            with contextlib.suppress(AttributeError):
                module: nn.Module = stage.get_submodule(target)
                if not isinstance(module, Foreign):
                    return module
        raise AttributeError(f"no stage of this rank has {target}")


def _first(named: Iterable[Iterable[tuple[str, Any]]]) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for pairs in named:
        for name, value in pairs:
            if name not in seen:
                seen.add(name)
                yield name, value
