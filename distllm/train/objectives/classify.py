"""Objectives with one target for a whole text: a class or a number.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms
from distllm.parallel.loss import at_least_fp32
from distllm.train.objectives.tokens import logits_of


def classification(outputs: Any, batch: Batch, *, label_smoothing: float = 0.0) -> LossTerms:
    """Cross entropy, in fp32 or fp64, of each row's class.

    Args:
        outputs: logits [B, C], or an object with `.logits`.
        batch: `labels` int64 [B], IGNORE for a row of padding.
        label_smoothing: the share of the class's probability spread over all classes, in training only
            (Szegedy et al. 2015, arXiv 1512.00567).

    Returns:
        sum: of -log p(label) in nats; count: labelled rows; parts, where gradients are off: `correct`, and `confusion`
        int64 [C, C], rows by true class, columns by the most likely one.
    """
    return class_terms(logits_of(outputs), batch.targets["labels"], label_smoothing=label_smoothing)


def class_terms(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float) -> LossTerms:
    """The loss terms of logits [B, C] and labels int64 [B], IGNORE where there is none."""
    smoothing = label_smoothing if torch.is_grad_enabled() else 0.0
    loss = F.cross_entropy(
        at_least_fp32(logits), labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )
    count = (labels != IGNORE).sum()
    if torch.is_grad_enabled():
        return LossTerms(loss, count)
    confusion = _confusion(labels, logits.argmax(-1), classes=logits.shape[-1])
    return LossTerms(loss, count, {"correct": confusion.diagonal().sum(), "confusion": confusion})


def _confusion(labels: torch.Tensor, predicted: torch.Tensor, *, classes: int) -> torch.Tensor:
    """How often class i, row, was taken for class j, column: int64 [C, C]; rows without a label fall into a cell of their own."""
    cell = torch.where(labels == IGNORE, classes * classes, labels * classes + predicted)
    counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell))[:-1].view(classes, classes)


def regression(outputs: Any, batch: Batch) -> LossTerms:
    """The squared error of each row's number.

    Args:
        outputs: predictions [B, 1] or [B], or an object with `.logits`.
        batch: `labels` float32 [B], and `weight` float32 [B], 0 for a row of padding.

    Returns:
        sum: of weighted squared errors; count: of weights; parts, where gradients are off: the sums `n`, `x`
        (predictions), `y` (targets), `xx`, `yy`, `xy`, `absolute` and `squared` (errors), in fp64.
    """
    return number_terms(logits_of(outputs), batch.targets["labels"], weight=batch.targets["weight"])


def number_terms(logits: torch.Tensor, labels: torch.Tensor, *, weight: torch.Tensor) -> LossTerms:
    """The loss terms of predictions [B, 1] or [B] against labels [B] with weights [B]."""
    predicted = at_least_fp32(logits.reshape(-1))
    loss, count = (weight * (predicted - labels).square()).sum(), weight.sum()
    if torch.is_grad_enabled():
        return LossTerms(loss, count)
    # Variances come from differences of these sums, which fp32 would lose.
    w, x, y = weight.double(), predicted.double(), labels.double()
    sums = {"n": w, "x": w * x, "y": w * y, "xx": w * x * x, "yy": w * y * y, "xy": w * x * y,
            "absolute": w * (x - y).abs(), "squared": w * (x - y).square()}  # fmt: skip
    return LossTerms(loss, count, {name: values.sum() for name, values in sums.items()})
