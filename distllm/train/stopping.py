"""Which evaluation is the best so far, and when to stop because none has been better for long."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from distllm.config.errors import ConfigError
from distllm.config.schema import TrainConfig

MINIMISED = ("loss", "perplexity", "bits_per_byte", "mse", "mae")
"""Figures of which less is better; of all others, more is."""


@dataclass(frozen=True)
class Best:
    """The best evaluation so far; JSON by `dataclasses.asdict`, and back by `Best(**...)`."""

    metric: str | None = None
    """What it is the best of; None before the first evaluation."""
    value: float | None = None
    """None before the first figure that is finite."""
    step: int | None = None
    """The step of the evaluation."""
    bad: int = 0
    """Evaluations in a row, since then, that were no better."""


@dataclass(frozen=True)
class Judgement:
    """What an evaluation changes."""

    best: Best
    improved: bool
    """Whether it is the best so far: its checkpoint is to be kept."""
    stop: bool
    """Whether there have been `patience` evaluations in a row without a better one."""


def out_of_patience(train: TrainConfig, best: Best) -> bool:
    """Whether there have been `train.patience` evaluations in a row without a better one."""
    return 0 < train.patience <= best.bad


def judge(best: Best, figures: Mapping[str, float], *, metric: str, step: int, patience: int) -> Judgement:
    """Compare an evaluation with the best so far; a pure function, so ranks with equal figures decide alike.

    Args:
        best: so far. One of another metric, as after a change of the config, is forgotten.
        figures: of the evaluation, as `Evaluation.as_metrics` names them.
        metric: `train.best_metric`, with or without its `val_`.
        step: of the evaluation.
        patience: `train.patience`; 0 never stops.

    Raises:
        ConfigError: the evaluation has no such figure.
    """
    name = figure_name(metric, figures)
    value = float(figures[name])
    if best.metric != name:
        best = Best(metric=name)
    if math.isfinite(value) and (best.value is None or _better(value, best.value, less=minimised(name))):
        return Judgement(Best(name, value, step, 0), improved=True, stop=False)
    best = replace(best, bad=best.bad + 1)  # one that is not finite is no better, whatever came before
    return Judgement(best, improved=False, stop=0 < patience <= best.bad)


def figure_name(metric: str, figures: Mapping[str, float]) -> str:
    """The full name of a metric among an evaluation's figures.

    Raises:
        ConfigError: there is none; names those that there are.
    """
    for name in (metric, f"val_{metric}"):
        if name in figures:
            return name
    near = difflib.get_close_matches(metric, figures, n=1, cutoff=0.0)
    raise ConfigError(
        [
            f"train.best_metric={metric}: the evaluation has no such figure; it has {', '.join(sorted(figures))}"
            + (f"; nearest: {near[0]}" if near else "")
        ]
    )


def minimised(name: str) -> bool:
    """Whether less of a figure is better, by the end of its name: `val_loss`, `val_sentiment_loss`, `mse`."""
    return any(name == word or name.endswith((f"_{word}", f"/{word}", f".{word}")) for word in MINIMISED)


def _better(value: float, best: float, *, less: bool) -> bool:
    return value < best if less else value > best
