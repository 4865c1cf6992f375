"""Which blocks go to which pipeline stage: evenly, by cost, or as the user says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import nn

from distllm.config.errors import ConfigError
from distllm.models.spec import ModelSpec
from distllm.parallel.cut import Chain


@dataclass(frozen=True)
class Costs:
    """What the parts of a model cost, in any one unit."""

    blocks: tuple[float, ...]
    front: float = 0.0
    """What stands before the blocks: on the first stage besides its blocks."""
    back: float = 0.0
    """What stands after: on the last stage."""


def estimated_costs(model: nn.Module, *, chain: Chain, spec: ModelSpec, seq_len: int) -> Costs:
    """Multiply-adds of one token's forward pass, by the matrices of each part and the width of attention.

    Args:
        model: the whole module on meta.
        chain: its parts.
        spec: with a transformers config, of experts only the active share counts.
        seq_len: S; attention's two products cost 2·S·D a block, over the whole sequence.
    """
    from distllm.models.flops import matrix_parameters

    def cost(path: str) -> float:
        return matrix_parameters(spec.hf_config, model.get_submodule(path))

    blocks = tuple(cost(path) + 2.0 * seq_len * chain.width for path in chain.blocks)
    return Costs(blocks, sum(map(cost, chain.front)), sum(map(cost, chain.back)))


def split_blocks(costs: Costs, *, stages: int) -> tuple[range, ...]:
    """Cut the chain into stages of at least one block so that the dearest one is as cheap as can be.

    Of those splits it takes the one with the smallest sum of squares, so that the others are even too.

    Args:
        costs: of the parts; measured, estimated, or all blocks 1 for an even split.
        stages: how many; at most as many as blocks.
    """
    count = len(costs.blocks)
    assert stages <= count, f"{stages} stages of {count} blocks"
    sums = list(accumulate(costs.blocks, initial=0.0))

    def stage_cost(begin: int, end: int) -> float:
        ends = (costs.front if begin == 0 else 0.0) + (costs.back if end == count else 0.0)
        return sums[end] - sums[begin] + ends

    dearest = _best(count, stages, stage_cost, lambda so_far, one: max(so_far, one))[0]
    limit = dearest * (1 + 1e-12)

    def square(begin: int, end: int) -> float:
        one = stage_cost(begin, end)
        return one * one if one <= limit else float("inf")

    ends = _best(count, stages, square, lambda so_far, one: so_far + one)[1]
    return tuple(range(begin, end) for begin, end in zip((0, *ends[:-1]), ends, strict=True))


def _best(
    count: int, stages: int, cost: Callable[[int, int], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The cheapest way to end `stages` stages at increasing block numbers, the last at `count`; dynamic programming."""
    found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(1, stages + 1):
        ends = (count,) if stage == stages else range(stage, count - (stages - stage) + 1)
        found = {
            end: min((join(so_far, cost(begin, end)), (*path, end)) for begin, (so_far, path) in found.items() if begin < end)
            for end in ends
        }
    return found[count]


def given_split(sizes: Sequence[int], *, stages: int, blocks: int) -> tuple[range, ...]:
    """The split that the user wrote, blocks per stage in the order of the forward pass.

    Raises:
        ConfigError: it does not fit the model or the layout.
    """
    problem = None
    if len(sizes) != stages:
        problem = f"must have {stages} numbers, one a stage"
    elif min(sizes) < 1:
        problem = "every stage needs a block"
    elif sum(sizes) != blocks:
        problem = f"must add up to the model's {blocks} blocks"
    if problem:
        near = [len(part) for part in split_blocks(Costs((1.0,) * blocks), stages=stages)]
        raise ConfigError([f"layout.pp_split={list(sizes)}: {problem}; nearest: {near}"])
    ends = list(accumulate(sizes, initial=0))
    return tuple(range(begin, end) for begin, end in pairwise(ends))
