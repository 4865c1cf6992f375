from __future__ import annotations

import math
import random

import pytest

from distllm.track.noise import NoiseScale


def test_the_ratio_is_of_the_averages_and_not_the_average_of_ratios() -> None:
    numbers, scale = random.Random(1), NoiseScale(decay=0.999)
    for _ in range(5000):
        scale.update(numbers.gauss(0.5, 2.0), numbers.gauss(30.0, 60.0))
    assert scale.value() == pytest.approx(60.0, rel=0.25)


def test_the_first_measurement_counts_whole_and_recent_ones_more() -> None:
    scale = NoiseScale(decay=0.9)
    assert scale.value() is None
    scale.update(2.0, 8.0)
    assert scale.value() == pytest.approx(4.0)
    for _ in range(100):
        scale.update(1.0, 8.0)
    assert scale.value() == pytest.approx(8.0, rel=1e-3)


def test_nonsense_is_passed_over_and_a_negative_average_gives_no_figure() -> None:
    scale = NoiseScale()
    scale.update(2.0, 8.0)
    scale.update(math.nan, 8.0)
    scale.update(1.0, math.inf)
    assert scale.value() == pytest.approx(4.0)
    scale.update(-100.0, 8.0)
    assert scale.value() is None
