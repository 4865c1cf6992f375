"""The figures of an evaluation by name, from the sums that the objectives give."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distllm.metrics.classification import classification_figures
from distllm.metrics.regression import regression_figures
from distllm.metrics.text import perplexity


def metrics_for(
    kind: str, *, total: float, count: float, parts: Mapping[str, torch.Tensor], tasks: Mapping[str, str] | None = None
) -> dict[str, float]:
    """What a task measures besides its loss, under the names of `config.metrics_table`.

    Args:
        kind: `task.kind`.
        total: the loss sum over all batches and ranks.
        count: the targets.
        parts: the objective's parts, added up in the same way; figures whose part is not there are left out.
        tasks: for multi_task, the kind of each task by name.

    Returns:
        Figures by name; of a task in `tasks` that had no sample, only its number of samples.
    """
    if kind == "multi_task":
        return {n: v for name, one in (tasks or {}).items() for n, v in _of_task(name, one, parts).items()}
    if kind == "classification":
        return classification_figures(parts["confusion"].numpy()) if "confusion" in parts else {}
    if kind == "regression":
        return regression_figures({name: float(part) for name, part in parts.items()}) if "n" in parts else {}
    figures = {"perplexity": perplexity(total / count), "tokens": count}
    if "correct" in parts:
        figures["accuracy"] = float(parts["correct"]) / count
    return figures


def _of_task(name: str, kind: str, parts: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The figures of one of several tasks. The loss of masked_lm is a mean over samples there, its perplexity over tokens."""
    own = {key.removeprefix(f"{name}."): part for key, part in parts.items() if key.startswith(f"{name}.")}
    samples = float(own["count"])
    figures = {"samples": samples}
    if samples:
        figures["loss"] = float(own["sum"]) / samples
        tokens = kind == "masked_lm"
        total, count = (own["nats"], own["tokens"]) if tokens else (own["sum"], own["count"])
        figures |= metrics_for(kind, total=float(total), count=float(count), parts=own)
    return {f"{name}.{figure}": value for figure, value in figures.items()}
