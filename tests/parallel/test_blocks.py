"""Blocks cover what a query may look at, once; their outputs and gradients add up; work is even."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import distllm.parallel.blocks as module
from distllm.parallel.blocks import Ranges, area, attend, blocks
from distllm.parallel.ring import zigzag
from distllm.parallel.ulysses import straight
from tests.parallel.attention import BATCH, by_the_book, held, problem, rule_named, worst

RULES = ["causal", "full", "documents", "padding", "causal padding", "window", "documents window"]


def places(runs: Ranges) -> list[int]:
    return [place for run in runs for place in run]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("cut", [zigzag, straight])
def test_ranks_hold_every_token_once_and_in_order(cut: object, ranks: int) -> None:
    runs = [cut(rank, ranks=ranks, seq_len=32) for rank in range(ranks)]  # type: ignore[operator]
    assert sorted(place for some in runs for place in places(some)) == list(range(32))
    assert all(a < b for some in runs for a, b in pairwise(places(some)))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zigzag_gives_every_rank_the_same_work_at_every_step(ranks: int) -> None:
    runs = [zigzag(rank, ranks=ranks, seq_len=32) for rank in range(ranks)]
    rule = rule_named("causal", 32)
    for step in range(ranks):
        work = [[area(b) for b in blocks(runs[r], runs[r - step], rule=rule)] for r in range(ranks)]
        assert {len(some) for some in work} == {1}  # one kernel a step
        assert len({sum(some) for some in work}) == 1
        assert sum(work[0]) == 32 * 32 / 2 / ranks**2  # all steps and ranks together: half of the square


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_blocks_cover_what_may_be_seen_once(ranks: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 3)
    rule, cpu = rule_named(name, 32), torch.device("cpu")
    wanted = rule.visible(range(32), range(32), device=cpu).expand(BATCH, 1, 32, 32)
    seen = torch.zeros(BATCH, 1, 32, 32, dtype=torch.int64)
    runs = [zigzag(rank, ranks=ranks, seq_len=32) for rank in range(ranks)]
    for mine in runs:
        for theirs in runs:
            for block in blocks(mine, theirs, rule=rule):
                rows, columns = places(mine)[block.queries], places(theirs)[block.keys]
                shown = torch.ones(1, 1, len(rows), len(columns), dtype=torch.int64)
                if block.causal:
                    shown = shown.tril()
                if block.mask is not None:
                    assert (list(block.mask[0]), list(block.mask[1])) == (rows, columns)
                    shown = rule.visible(*block.mask, device=cpu).long()
                seen[:, :, torch.tensor(rows)[:, None], torch.tensor(columns)] += shown
    assert torch.equal(seen, wanted.long())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", RULES)
def test_parts_add_up(
    name: str, dtype: torch.dtype, bound: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TILE", 3)
    given, rule = problem(32, 4, 2, dtype), rule_named(name, 32)
    if rule.starts is not None:
        rule = replace(rule, starts=rule.starts.to(device))
    if rule.seen is not None:
        rule = replace(rule, seen=rule.seen.to(device))
    query, key, value, grad = (tensor.to(device) for tensor in given)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    runs = [zigzag(rank, ranks=2, seq_len=32) for rank in range(2)]
    kv = torch.stack([torch.stack((held(key, some), held(value, some))) for some in runs])
    outs = [attend(held(query, some), kv, mine=some, theirs=runs, rule=rule) for some in runs]
    order = torch.tensor([place for some in runs for place in places(some)]).argsort().to(device)
    out = torch.cat(outs, 2)[:, :, order]
    assert out.dtype == dtype
    found = [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]
    wanted = by_the_book(given, rule_named(name, 32))
    assert worst([tensor.double().cpu().numpy() for tensor in found], wanted) < bound


def test_a_masked_block_is_a_tile_however_long_the_sequence() -> None:
    rule = rule_named("documents", 32)
    (mine,) = runs = straight(0, ranks=1, seq_len=10 * module.TILE)
    sizes = [(b.queries.stop - b.queries.start, b.keys.stop - b.keys.start) for b in blocks(runs, runs, rule=rule)]
    assert set(sizes) == {(module.TILE, module.TILE)} and len(sizes) == 10 * 11 // 2 and len(mine) == 10 * module.TILE
