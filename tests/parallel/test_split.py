"""Blocks are spread so that the dearest stage is as cheap as can be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from distllm.config.errors import ConfigError
from distllm.models.build import meta_model
from distllm.parallel.cut import find_chain
from distllm.parallel.measure import measured_costs
from distllm.parallel.split import Costs, estimated_costs, given_split, split_blocks
from distllm.parallel.stages import apply_pp
from tests.models.families import spec_of


def sizes(costs: Costs, stages: int) -> list[int]:
    return [len(part) for part in split_blocks(costs, stages=stages)]


def test_equal_blocks_are_spread_evenly() -> None:
    assert sizes(Costs((1.0,) * 8), 4) == [2, 2, 2, 2]
    assert sorted(sizes(Costs((1.0,) * 10), 4)) == [2, 2, 3, 3]


def test_a_dear_head_takes_blocks_from_the_last_stage() -> None:
    assert sizes(Costs((1.0,) * 8, back=2.0), 2) == [5, 3]
    assert sizes(Costs((1.0,) * 9, front=1.0, back=3.0), 4) == [2, 3, 3, 1]


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7])
def test_no_other_split_is_better(stages: int) -> None:
    costs = Costs((3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0), front=2.0, back=6.0)

    def spread(ends: tuple[int, ...]) -> tuple[float, float]:
        edges = [0, *ends, 7]
        each = [sum(costs.blocks[a:b]) for a, b in pairwise(edges)]
        each[0] += costs.front
        each[-1] += costs.back
        return max(each), sum(cost * cost for cost in each)

    best = min(spread(ends) for ends in combinations(range(1, 7), stages - 1))
    found = split_blocks(costs, stages=stages)
    assert spread(tuple(part.stop for part in found[:-1])) == best


def test_costs_are_those_of_the_matrices() -> None:
    """LLaMA of width 32: attention 32·(32+16+16)+32·32, MLP 3·32·64, and 2·S·D for what tokens look up in each other."""
    spec = spec_of("llama")
    model = meta_model(spec)
    costs = estimated_costs(model, chain=find_chain(model, spec=spec, pp=2), spec=spec, seq_len=16)
    assert costs.blocks == (32 * 64 + 32 * 32 + 3 * 32 * 64 + 2 * 16 * 32,) * 2
    assert (costs.front, costs.back) == (0.0, 32 * 300)


def test_only_the_experts_that_a_token_sees_cost() -> None:
    spec = spec_of("mixtral")  # 2 of 4 experts
    model = meta_model(spec)
    costs = estimated_costs(model, chain=find_chain(model, spec=spec, pp=2), spec=spec, seq_len=16)
    assert costs.blocks[0] == 32 * 64 + 32 * 32 + 4 * 32 + 2 * 3 * 32 * 64 + 2 * 16 * 32


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([4, 4, 0], "layout.pp_split=[4, 4, 0]: must have 2 numbers, one a stage; nearest: [4, 4]"),
        ([8, 0], "layout.pp_split=[8, 0]: every stage needs a block; nearest: [4, 4]"),
        ([3, 4], "layout.pp_split=[3, 4]: must add up to the model's 8 blocks; nearest: [4, 4]"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(given: list[int], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        given_split(given, stages=2, blocks=8)
    assert str(error.value) == line


def test_a_split_of_the_users_own_is_taken() -> None:
    assert given_split([3, 5], stages=2, blocks=8) == (range(0, 3), range(3, 8))


def test_more_stages_than_blocks_are_refused() -> None:
    spec = spec_of("llama", num_hidden_layers=6)
    with pytest.raises(ConfigError) as error:
        apply_pp(meta_model(spec), rank=0, owners=(0, 1, 2, 3, 3, 2, 1, 0), spec=spec, seq_len=4)
    assert str(error.value) == "layout.pp=4: 8 stages need a block each, and llama has 6; nearest: 3"


def test_measured_costs_are_those_of_the_clock() -> None:
    """The middle block takes 2 s, the first with the embedding 3 s, the last with norm and head 7 s, by the clock."""
    spec = spec_of("llama", num_hidden_layers=5)
    model = meta_model(spec)
    took, now = iter([2.0, 9.0, 9.0, 3.0, 9.0, 9.0, 9.0, 7.0, 9.0]), [0.0]
    ticks = iter(range(100))

    def clock() -> float:
        now[0] += next(took) if next(ticks) % 2 else 0.0
        return now[0]

    chain = find_chain(model, spec=spec, pp=2)
    costs = measured_costs(model, chain=chain, rows=2, length=4, device=torch.device("cpu"), clock=clock)
    assert costs == Costs((2.0,) * 5, front=1.0, back=5.0)
    assert sizes(costs, 2) == [3, 2] and next(took, None) is None
    assert all(p.is_meta for p in model.parameters()) and not hasattr(model.forward, "_slot")
    cut = apply_pp(model, rank=0, owners=(0, 1), spec=spec, seq_len=4, costs=Costs((1.0,) * 5, back=9.0))
    assert cut.blocks == (range(0, 4), range(4, 5))
