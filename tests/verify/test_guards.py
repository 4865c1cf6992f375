"""The guards trip on what proves nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from distllm.verify import guards
from distllm.verify.judge import QUANTITIES, Verdict
from distllm.verify.trial import Trace


def trace(seed: int) -> Trace:
    rng = np.random.default_rng(seed)

    def arrays() -> dict[str, np.ndarray]:
        return {f"layers.{i}.weight": rng.normal(size=(3, 4)) for i in range(5)}

    return Trace([2.0, 1.9, 1.8 + rng.random()], [1.0] * 3, [0.1] * 3, arrays(), [arrays() for _ in range(3)], arrays(), [{}] * 3)


def other(seed: int = 1) -> Trace:
    return replace(trace(seed), losses=[2.1, 1.95, 1.7])


def test_a_living_model_passes() -> None:
    assert list(guards.dead(trace(0), other())) == []


def test_a_loss_that_stands_still() -> None:
    still = replace(trace(0), losses=[2.0, 2.0, 2.0])
    assert list(guards.dead(still, other())) == ["the loss does not move: it is 2.000000 at every step"]


def test_a_loss_that_is_no_number() -> None:
    (line,) = guards.dead(replace(trace(0), losses=[2.0, float("nan"), 2.0]), other())
    assert "not finite" in line


def test_gradients_of_zero_and_weights_that_stand_still() -> None:
    good = trace(0)
    gradients = [{**g, "layers.2.weight": np.zeros((3, 4))} for g in good.gradients]
    weights = {**good.weights, "layers.3.weight": good.starts["layers.3.weight"]}
    lines = list(guards.dead(replace(good, gradients=gradients, weights=weights), other()))
    assert lines == ["the gradient is zero at every step: layers.2.weight", "the weights do not move: layers.3.weight"]


def test_a_seed_that_decides_nothing() -> None:
    good = trace(0)
    lines = list(guards.dead(good, good))
    assert lines == ["two seeds give the same initial weights", "two seeds give the same loss"]


def test_too_few_numbers() -> None:
    verdict = Verdict(dict.fromkeys(QUANTITIES, 0.0), {}, {}, (), 999)
    assert list(guards.too_little(verdict)) == ["only 999 numbers were compared; at least 1000 are to be"]
    assert not list(guards.too_little(replace(verdict, compared=1000)))
