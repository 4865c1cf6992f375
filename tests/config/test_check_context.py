"""The rules of context parallelism, each with the nearest legal value."""

from __future__ import annotations

import pytest

from distllm.config.check_context import context_problems


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_what_divides_is_right(method: str) -> None:
    for cp in (1, 2, 4):
        assert list(context_problems(64, cp=cp, method=method, heads=8, tp=2)) == []  # type: ignore[arg-type]


def test_a_sequence_is_cut_in_two_parts_a_rank_or_one() -> None:
    (line,) = context_problems(1020, cp=4, method="ring", heads=None, tp=1)
    assert line == (
        "data.seq_len=1020: must be a multiple of 8, because ring over layout.cp=4 cuts it in 8; nearest: 1024"
    )
    assert list(context_problems(1020, cp=4, method="ulysses", heads=8, tp=1)) == []
    (line,) = context_problems(3, cp=8, method="all_gather", heads=8, tp=1)
    assert line.endswith("nearest: 16")


def test_ulysses_spreads_the_heads_that_tensor_parallelism_leaves() -> None:
    (line,) = context_problems(64, cp=4, method="ulysses", heads=12, tp=2)
    assert line == (
        "layout.cp=4: ulysses spreads heads, and 4 does not divide 6 (heads 12 / tp 2); "
        "nearest: 3, or layout.cp_method=all_gather"
    )
    assert list(context_problems(64, cp=4, method="ring", heads=6, tp=1)) == []
    assert list(context_problems(64, cp=4, method="ulysses", heads=6, tp=4)) == []  # told by tensor parallelism
    (line,) = context_problems(64, cp=8, method="ulysses", heads=4, tp=1)
    assert "nearest: 4, or" in line
