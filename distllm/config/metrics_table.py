"""Which figures an evaluation of each kind of task gives, by name: for the checks of a config and its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

AVERAGES = ("micro", "macro", "weighted")
CLASSIFICATION = ("accuracy", *(f"{what}_{how}" for how in AVERAGES for what in ("precision", "recall", "f1")))
REGRESSION = ("mse", "mae", "pearson", "r2")
TOKENS = ("perplexity", "tokens", "accuracy")
WRITTEN = {"bleu": ("seq2seq",), "chrf": ("seq2seq",)}
"""What has to be asked for, because it takes time, and the kinds of task that have it."""

BY_KIND: Mapping[str, tuple[str, ...]] = {
    "causal_lm": TOKENS,
    "masked_lm": TOKENS,
    "translation_lm": TOKENS,
    "seq2seq": TOKENS,
    "sft": TOKENS,
    "classification": CLASSIFICATION,
    "regression": REGRESSION,
}


def known_metrics(kind: str, *, tasks: Mapping[str, str] | None = None, asked: Sequence[str] = ()) -> tuple[str, ...]:
    """The figures of an evaluation, in the order they are told; `loss` is always one.

    Args:
        kind: `task.kind`.
        tasks: for multi_task, the kind of each task by name: its figures are called NAME.FIGURE.
        asked: `task.metrics`, for what is measured only if asked for.
    """
    if kind == "multi_task":
        own = [f"{name}.{figure}" for name, one in (tasks or {}).items() for figure in ("samples", "loss", *BY_KIND[one])]
        return ("loss", *own)
    return ("loss", *BY_KIND[kind], *(name for name in asked if kind in WRITTEN.get(name, ())))
