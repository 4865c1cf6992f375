"""Figures from sums against scipy and scikit-learn on the numbers themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as sk

from distllm.metrics.regression import regression_figures


def sums_of(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    return {
        "n": len(x), "x": x.sum(), "y": y.sum(), "xx": (x * x).sum(), "yy": (y * y).sum(), "xy": (x * y).sum(),
        "absolute": np.abs(x - y).sum(), "squared": ((x - y) ** 2).sum(),
    }  # fmt: skip


@pytest.mark.parametrize("offset", [0.0, 2000.0])
def test_equals_scipy_and_scikit_learn(offset: float) -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=200) + offset
    x = 0.7 * y + 0.2 * rng.normal(size=200) + 0.3 * offset
    found = regression_figures(sums_of(x, y))
    close = 1e-8 if offset else 1e-12
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(x, y).statistic, rel=close)
    assert found["r2"] == pytest.approx(sk.r2_score(y, x), rel=close)
    assert found["mse"] == pytest.approx(sk.mean_squared_error(y, x), rel=1e-12)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(y, x), rel=1e-12)


def test_what_a_constant_leaves_undefined() -> None:
    same = regression_figures(sums_of(np.full(7, 0.1), np.full(7, 0.1)))
    assert math.isnan(same["pearson"]) and math.isnan(same["r2"]) and same["mse"] == 0.0
    constant = regression_figures(sums_of(np.full(7, 0.1), np.arange(7.0)))
    assert math.isnan(constant["pearson"]) and constant["r2"] < 0.0
