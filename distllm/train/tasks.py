"""The tasks: for each kind its objective and the figures that its sums give. Adding a task adds a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from distllm.config.schema import Config, TaskConfig
from distllm.engine.base import Objective
from distllm.evaluate import Figures, Totals
from distllm.metrics.figures import metrics_for
from distllm.train.objectives import causal_lm, classification, masked_lm, multi_task, regression, seq2seq, sft

Labels = Mapping[str, Sequence[str]]
"""Task name ("" where there is but one) -> the names of its classes, in the order of their numbers; none for a number."""

OBJECTIVES: Mapping[str, Objective] = {
    "causal_lm": causal_lm, "sft": sft, "seq2seq": seq2seq, "masked_lm": masked_lm, "translation_lm": masked_lm,
    "classification": classification,
}  # fmt: skip
WRITES = ("causal_lm", "sft")
"""Tasks whose models continue a text."""


@dataclass(frozen=True)
class Task:
    """What a run learns."""

    kind: str
    objective: Objective
    """(outputs, batch) -> LossTerms."""
    figures: Figures
    """The sums of an evaluation -> figures by name."""


def make_task(config: Config) -> Task:
    """The task of a config: `task` is read."""
    return Task(config.task.kind, _objective(config.task), figures_of(config))


def _objective(task: TaskConfig) -> Objective:
    smoothing = task.label_smoothing
    if task.kind == "regression":
        return regression
    if task.kind == "multi_task":
        return partial(multi_task, tasks=task.tasks, label_smoothing=smoothing)
    objective = OBJECTIVES[task.kind]
    return partial(objective, label_smoothing=smoothing) if smoothing else objective  # type: ignore[call-arg]


def figures_of(config: Config) -> Figures:
    """What a config's task makes of the sums of an evaluation."""
    kinds = {name: head.kind for name, head in config.task.tasks.items()}

    def figures(totals: Totals) -> dict[str, float]:
        return metrics_for(config.task.kind, total=totals.sum, count=totals.count, parts=totals.parts, tasks=kinds)

    return figures


def token_figures(totals: Totals) -> dict[str, float]:
    """The figures of a language model."""
    return metrics_for("causal_lm", total=totals.sum, count=totals.count, parts=totals.parts)


def outputs_of(labels: Labels) -> dict[str, int]:
    """How many outputs the head of each task has: its classes, or one number."""
    return {name: len(names) or 1 for name, names in labels.items()}
