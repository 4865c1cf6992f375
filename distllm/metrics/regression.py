"""Figures of predicted numbers from their sums."""

from __future__ import annotations

import math
from collections.abc import Mapping

NOISE = 1e-14
"""A variance below this share of the mean square is what rounding leaves of none."""


def regression_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Mean squared and mean absolute error, Pearson's correlation, and the coefficient of determination r2.

    Args:
        sums: over samples, fp64: `n`, of predictions `x` and targets `y` the sums `x`, `y`, `xx`, `yy`, `xy`, and of
            errors `absolute` and `squared`.

    Returns:
        The figures; pearson is not a number where predictions or targets are all the same, r2 where targets are.
    """
    n = sums["n"]
    x, y = _variance(sums["x"], sums["xx"], n), _variance(sums["y"], sums["yy"], n)
    covariance = sums["xy"] - sums["x"] * sums["y"] / n
    return {
        "mse": sums["squared"] / n,
        "mae": sums["absolute"] / n,
        "pearson": covariance / math.sqrt(x * y) if x and y else math.nan,
        "r2": 1.0 - sums["squared"] / y if y else math.nan,
    }


def _variance(total: float, squares: float, n: float) -> float:
    """The sum of squared distances from the mean."""
    value = squares - total * total / n
    return value if value > NOISE * squares else 0.0
