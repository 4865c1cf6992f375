"""Objectives: model outputs and a batch -> LossTerms, always sums, never means."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms


def causal_lm(outputs: Any, batch: Batch) -> LossTerms:
    """Next-token cross entropy in fp32.

    Args:
        outputs: logits [B, S, V], or an object with `.logits`.
        batch: `labels` int64 [B, S], already shifted, IGNORE where there is no target.

    Returns:
        sum: of -log p(label) in nats; count: targets; parts: `correct`, the targets that are the most likely token
        (only where gradients are off: training does not pay for it).
    """
    logits = getattr(outputs, "logits", outputs)
    labels = batch.targets["labels"]
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    count = (labels != IGNORE).sum()
    if torch.is_grad_enabled():
        return LossTerms(loss, count)
    return LossTerms(loss, count, {"correct": (logits.argmax(-1) == labels).sum()})
