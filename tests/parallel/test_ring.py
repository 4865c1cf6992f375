"""Attention over ranks equals attention in one process, and sends what the formulas say (figures 1.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distllm.comm import World
from distllm.parallel.blocks import Ranges, Rule
from distllm.parallel.ring import gathered_attention, ring_attention, zigzag
from distllm.parallel.ulysses import straight, ulysses_attention
from tests.parallel.attention import BATCH, SCALE, WIDTH, by_the_book, held, problem, rule_named, worst
from tests.parallel.wire import Wire
from tests.ranks import on_ranks

Cut = Callable[..., Ranges]
METHODS: dict[str, tuple[Callable[..., torch.Tensor], Cut]] = {
    "ring": (ring_attention, zigzag), "all_gather": (gathered_attention, zigzag), "ulysses": (ulysses_attention, straight),
}  # fmt: skip
RULES = ("causal", "full", "documents", "padding", "window", "documents window")
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
"""bf16: keys' gradients are rounded at each hop."""
SEQ = 32


def part(world: World, method: str, heads: tuple[int, int], rule: Rule, dtype: torch.dtype) -> dict[str, Any]:
    """Output and gradients of this rank's tokens, where they stand, and what was sent in both passes."""
    attention, cut = METHODS[method]
    group = dist.group.WORLD
    runs = cut(world.rank, ranks=world.size, seq_len=SEQ)
    query, key, value, grad = (held(tensor, runs) for tensor in problem(SEQ, *heads, dtype))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    with Wire(world.size) as forward:
        out = attention(query, key, value, group=group, rule=rule)
    with Wire(world.size) as backward:
        gradients = torch.autograd.grad(out, (query, key, value), grad)
    assert {tensor.dtype for tensor in (out, *gradients)} == {dtype}
    return {
        "found": [tensor.detach().double().numpy() for tensor in (out, *gradients)],
        "places": [place for run in runs for place in run],
        "calls": (dict(forward.calls), dict(backward.calls)),
        "bytes": (dict(forward.bytes), dict(backward.bytes)),
    }


def whole(parts: list[dict[str, Any]]) -> list[np.ndarray]:
    """Outputs and gradients of all ranks' tokens in the order of the sequence."""
    order = np.argsort([place for some in parts for place in some["places"]])
    return [np.concatenate([some["found"][i] for some in parts], 2)[:, :, order] for i in range(4)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_cut_attention_is_attention(method: str, ranks: int, tmp_path: Path) -> None:
    cases = [
        (heads, name, dtype)
        for heads in ((4, 4), (4, 2), (8, 1))
        for name in RULES
        for dtype in (BOUNDS if heads == (4, 2) else [torch.float64])
    ]

    def rank(world: World) -> list[dict[str, Any]]:
        return [part(world, method, heads, rule_named(name, SEQ), dtype) for heads, name, dtype in cases]

    parts = on_ranks(rank, ranks, tmp_path)
    for i, (heads, name, dtype) in enumerate(cases):
        wanted = by_the_book(problem(SEQ, *heads, dtype), rule_named(name, SEQ))
        error = worst(whole([some[i] for some in parts]), wanted)
        assert error < BOUNDS[dtype], (heads, name, dtype, error)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_calls_and_bytes_are_those_of_the_formula(method: str, ranks: int, tmp_path: Path) -> None:
    heads, kv_heads, others = 8, 4, ranks - 1
    rule = replace(rule_named("causal", SEQ), scale=SCALE)
    found = on_ranks(lambda world: part(world, method, (heads, kv_heads), rule, torch.float32), ranks, tmp_path)[0]
    hidden = SEQ * BATCH * heads * WIDTH * 4  # s b h e
    k = kv_heads / heads
    if method == "ring":
        once = 2 * others / ranks * hidden * k
        assert found["calls"] == ({"send": others, "recv": others}, {"send": 2 * others, "recv": 2 * others})
        assert [some["send"] for some in found["bytes"]] == [once, 2 * once]
    elif method == "all_gather":
        once = 2 * others / ranks * hidden * k
        assert found["calls"] == ({"all_gather": 1}, {"reduce_scatter": 1})
        assert found["bytes"] == ({"all_gather": once}, {"reduce_scatter": once})
    else:
        once = others / ranks * hidden / ranks * (2 + 2 * k)
        assert found["calls"] == ({"all_to_all": 2}, {"all_to_all": 2})
        assert found["bytes"] == ({"all_to_all": once}, {"all_to_all": once})


def test_keys_travel_as_they_are_and_are_repeated_only_where_ulysses_cannot_spread_them(tmp_path: Path) -> None:
    def rank(world: World) -> list[dict[str, Any]]:
        rule = rule_named("causal", SEQ)
        return [part(world, method, (8, 1), rule, torch.float32)["bytes"][0] for method in METHODS]

    ring, gathered, ulysses = on_ranks(rank, 2, tmp_path)[0]
    token = SEQ * BATCH * WIDTH * 4 // 2  # bytes of one head of what a rank holds
    assert ring["send"] == gathered["all_gather"] == 2 * token
    assert ulysses["all_to_all"] == (8 + 2 * 2 + 8) * token // 2
