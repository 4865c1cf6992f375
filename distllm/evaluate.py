"""Validation: the mean loss over all target tokens of all ranks, whatever the split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distllm.comm import sum_over
from distllm.config.errors import DataError
from distllm.data.batch import Batch
from distllm.engine.base import LossTerms


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; the same on every rank of the group."""

    loss: float
    """Nats a target token."""
    perplexity: float
    """exp(loss); infinity where that is no float."""
    accuracy: float | None
    """The share of target tokens that the model thinks most likely, 0 to 1; None if they are not counted."""
    tokens: int
    """Target tokens."""

    def as_metrics(self) -> dict[str, float]:
        """The figures under their names in `metrics.jsonl`."""
        metrics = {"val_loss": self.loss, "val_perplexity": self.perplexity, "val_tokens": float(self.tokens)}
        return metrics if self.accuracy is None else {**metrics, "val_accuracy": self.accuracy}


def evaluate(
    eval_step: Callable[[Batch], LossTerms], batches: Iterable[Batch], *, group: dist.ProcessGroup | None, device: torch.device
) -> Evaluation:
    """Run `batches` through `eval_step` and add up.

    The sums stay on the device in fp64 until all batches are through, so no batch waits for the one before; then one
    all-reduce over `group`. Ranks may have different numbers of batches as far as this function goes; an `eval_step`
    that communicates (sharded parameters) needs the same number on each.

    Args:
        eval_step: gives this rank's sums of one micro-batch; an engine's, or any model's.
        batches: this rank's micro-batches. Padding (labels all IGNORE) has no weight.
        group: the data-parallel ranks; None is a group of one.
        device: where the sums live.

    Returns:
        The figures over all ranks.

    Raises:
        DataError: no rank had a target token.
    """
    total = torch.zeros(4, dtype=torch.float64, device=device)  # sum, count, correct, batches that counted correct ones
    for batch in batches:
        terms = eval_step(batch.to(device))
        correct = terms.parts.get("correct")
        total[0] += terms.sum.detach()
        total[1] += terms.count
        if correct is not None:
            total[2] += correct
            total[3] += 1
    loss_sum, count, correct_sum, counted = sum_over(total, group).tolist()  # over dp: each rank saw other samples
    if count == 0:
        raise DataError("evaluation: the validation data have no target token; give more text or a larger fraction")
    loss = loss_sum / count
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    return Evaluation(loss, perplexity, correct_sum / count if counted else None, round(count))
