"""Schedules: pure functions of the step, with the values that their papers say."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from distllm.config.schema import ScheduleConfig
from distllm.train.schedule import learning_rate

STEPS = 100


def rate(step: int, **settings: Any) -> float:
    return learning_rate(step, config=ScheduleConfig(**{"warmup": 10, **settings}), peak=2.0, steps=STEPS)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_warm_up_is_linear_and_ends_at_the_peak(name: str) -> None:
    assert [rate(s, name=name) for s in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(10, name=name) == pytest.approx(2.0)


@pytest.mark.parametrize(("name", "last"), [("linear", 0.2), ("cosine", 0.2), ("wsd", 0.2), ("constant", 2.0)])
def test_the_last_update_has_the_final_rate(name: str, last: float) -> None:
    assert rate(STEPS - 1, name=name) == pytest.approx(last, rel=0.06)
    assert rate(STEPS + 50, name=name) == pytest.approx(last, rel=0.06)  # beyond the end it stays there


def test_values_in_the_middle() -> None:
    half = 10 + (STEPS - 1 - 10) / 2
    assert (rate(54, name="linear") + rate(55, name="linear")) / 2 == pytest.approx(1.1)
    assert half == 54.5
    assert (rate(54, name="cosine") + rate(55, name="cosine")) / 2 == pytest.approx(1.1, rel=1e-3)
    assert rate(40, name="inverse_sqrt") == pytest.approx(2.0 * math.sqrt(10 / 40))
    assert rate(79, name="wsd") == 2.0 and rate(80, name="wsd") < 2.0


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "inverse_sqrt"])
def test_after_the_warm_up_it_never_rises(name: str) -> None:
    rates = [rate(s, name=name) for s in range(10, STEPS)]
    assert all(a >= b for a, b in pairwise(rates)) and rates[0] > rates[-1]


def test_no_warm_up_starts_at_the_peak() -> None:
    for name in ("constant", "linear", "cosine", "wsd", "inverse_sqrt"):
        assert rate(0, name=name, warmup=0) == 2.0


def test_auto_warms_up_for_a_hundred_steps_or_a_tenth_of_a_short_run() -> None:
    def first(steps: int) -> float:
        return learning_rate(0, config=ScheduleConfig(), peak=1.0, steps=steps)

    assert [first(s) for s in (100_000, 1000, 200, 20, 5)] == pytest.approx([0.01, 0.01, 0.05, 0.5, 1.0])
