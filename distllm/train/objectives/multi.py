"""The objective of several tasks that share a body.

Shapes: T rows of one task, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from distllm.config.schema import HeadConfig
from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms
from distllm.parallel.loss import at_least_fp32
from distllm.train.objectives.classify import class_terms, number_terms
from distllm.train.objectives.tokens import places_of


def multi_task(
    outputs: Any, batch: Batch, *, tasks: Mapping[str, HeadConfig], label_smoothing: float = 0.0
) -> LossTerms:
    """The sum of each sample's loss under its own task, times the task's weight.

    Args:
        outputs: an object whose `.logits` has, for each task by name, the logits of its T rows: [T, C], [T, 1], or
            [T, S, V]; T may be 0, and such a task still takes part, with zero gradients.
        batch: for each task `labels_NAME` as its own objective wants them, for regression also `weight_NAME` [T].
        tasks: the tasks by name.
        label_smoothing: for the tasks that have classes or tokens, in training only.

    Returns:
        sum: of weighted losses a sample (masked_lm: the mean over the sample's masked tokens); count: samples that have
        a target; parts, where gradients are off: for each task `NAME.sum` and `NAME.count`, without its weight, and the
        parts of its objective (masked_lm: `NAME.correct`, `NAME.tokens`, and `NAME.nats`, the plain sum over tokens).
    """
    parts: dict[str, torch.Tensor] = {}
    sums: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    for name, task in tasks.items():
        terms = _task_terms(name, task, outputs.logits[name], batch, label_smoothing=label_smoothing)
        sums.append(terms.sum * task.weight)
        counts.append(terms.count.float())
        if not torch.is_grad_enabled():
            own = {"sum": terms.sum, "count": terms.count, **terms.parts}
            parts |= {f"{name}.{key}": value for key, value in own.items()}
    return LossTerms(torch.stack(sums).sum(), torch.stack(counts).sum(), parts)


def _task_terms(
    name: str, task: HeadConfig, logits: torch.Tensor, batch: Batch, *, label_smoothing: float
) -> LossTerms:
    labels = batch.targets[f"labels_{name}"]
    if task.kind == "regression":
        return number_terms(logits, labels, weight=batch.targets[f"weight_{name}"])
    if task.kind == "classification":
        return class_terms(logits, labels, label_smoothing=label_smoothing)
    return _mean_by_sample(logits, labels, label_smoothing=label_smoothing)


def _mean_by_sample(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float) -> LossTerms:
    """Masked tokens [T, S, V], [T, S]: each sample's mean, so that a long text weighs no more than one label does."""
    smoothing = label_smoothing if torch.is_grad_enabled() else 0.0
    tokens = (labels != IGNORE).sum(1)  # [T]
    places = places_of(labels)  # [N]
    chosen, wanted = logits.flatten(0, 1)[places], labels.flatten()[places]
    losses = F.cross_entropy(at_least_fp32(chosen), wanted, reduction="none", label_smoothing=smoothing)
    loss, count = (losses / tokens[places // labels.shape[1]]).sum(), (tokens > 0).sum()
    if torch.is_grad_enabled():
        return LossTerms(loss, count)
    parts = {"correct": (chosen.argmax(-1) == wanted).sum(), "tokens": tokens.sum(), "nats": losses.sum()}
    return LossTerms(loss, count, parts)
