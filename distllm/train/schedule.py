"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from distllm.config.check import warmup_steps
from distllm.config.schema import ScheduleConfig


def learning_rate(step: int, *, config: ScheduleConfig, peak: float, steps: int) -> float:
    """The learning rate of update `step`.

    Args:
        step: the number of updates already taken, from 0.
        config: the schedule's name and its numbers.
        peak: the rate at the end of the warm-up.
        steps: updates of the whole run; the last one is number steps - 1.

    Returns:
        The rate. During warm-up it is peak * (step + 1) / warmup, so that no update is wasted at rate 0; the decay
        reaches `final` * peak at the last update.

    Sources: cosine, Loshchilov & Hutter 2016 (arXiv 1608.03983); wsd, Hu et al. 2024 (arXiv 2404.06395);
    inverse square root, Vaswani et al. 2017 (arXiv 1706.03762).
    """
    warmup = warmup_steps(config, steps=steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = step - warmup
    span = max(1, steps - 1 - warmup)
    progress = min(1.0, done / span)
    floor = config.final
    if config.name == "constant":
        return peak
    if config.name == "linear":
        return peak * (1.0 - (1.0 - floor) * progress)
    if config.name == "cosine":
        return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    if config.name == "inverse_sqrt":
        start = max(1, warmup)
        return peak * math.sqrt(start / (start + done))
    assert config.name == "wsd", config.name
    tail = max(1, round(config.decay_fraction * steps))
    left = steps - 1 - step
    return peak if left >= tail else peak * (floor + (1.0 - floor) * max(0, left) / tail)


def make_schedule(config: ScheduleConfig, *, peak: float, steps: int) -> Callable[[int], float]:
    """`learning_rate` with everything but the step given."""
    return lambda step: learning_rate(step, config=config, peak=peak, steps=steps)
