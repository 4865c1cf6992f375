"""The gradient noise scale of a run, smoothed over its steps."""

from __future__ import annotations

import math


class NoiseScale:
    """tr(S) / |G|^2 in samples: below this batch size, twice the batch nearly halves the steps that are needed.

    The estimates of single steps are noisy and may be negative, and a mean of ratios is biased; so the two are averaged
    apart, and the ratio is taken of the averages (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).
    """

    def __init__(self, *, decay: float = 0.95) -> None:
        """Args:
        decay: of the two exponential averages; 0.95 looks back about 20 measurements.
        """
        self._decay = decay
        self._squared_norm = self._variance = 0.0  # that they start at zero cancels in the ratio

    def update(self, squared_norm: float, variance: float) -> None:
        """Learn of one step.

        Args:
            squared_norm: the estimate of |G|^2.
            variance: the estimate of tr(S), of one sample's gradient. A step with a value that is not finite is passed over.
        """
        if math.isfinite(squared_norm) and math.isfinite(variance):
            self._squared_norm = self._decay * self._squared_norm + (1.0 - self._decay) * squared_norm
            self._variance = self._decay * self._variance + (1.0 - self._decay) * variance

    def value(self) -> float | None:
        """The noise scale in samples; None as long as the averages give none."""
        if self._squared_norm <= 0.0 or self._variance <= 0.0:
            return None
        return self._variance / self._squared_norm
