"""Objectives over tokens: cross entropy at the places that have a label.

Shapes: B batch, S sequence, N places, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms
from distllm.parallel.loss import CutLogits, is_cut_logits
from distllm.train.objectives.cross_entropy import summed_cross_entropy


def causal_lm(outputs: Any, batch: Batch, *, label_smoothing: float = 0.0) -> LossTerms:
    """Cross entropy in fp32 at every place that has a label; most have one.

    Args:
        outputs: logits [B, S, V], or an object with `.logits`.
        batch: `labels` int64 [B, S], aligned with the logits (shifted already), IGNORE where there is no target.
        label_smoothing: the share of the target's probability spread over all tokens, in training only
            (Szegedy et al. 2015, arXiv 1512.00567).

    Returns:
        sum: of -log p(label) in nats; count: targets; parts: `correct`, the targets that are the most likely token
        (only where gradients are off: training does not pay for it).
    """
    return token_terms(logits_of(outputs), batch.targets["labels"].flatten(), label_smoothing=label_smoothing)


# Encoder-decoders and packed conversations come with labels that are aligned with their logits too.
seq2seq = causal_lm
sft = causal_lm


def masked_lm(outputs: Any, batch: Batch, *, label_smoothing: float = 0.0) -> LossTerms:
    """Cross entropy in fp32 at the few places that were masked (Devlin et al. 2018, arXiv 1810.04805).

    Args:
        outputs: logits [B, S, V], or an object with `.logits`.
        batch: `labels` int64 [B, S], the token itself at masked places and IGNORE elsewhere.
        label_smoothing: as in `causal_lm`.

    Returns:
        sum, count and parts as `causal_lm`.
    """
    labels = batch.targets["labels"].flatten()
    places = places_of(labels)
    return token_terms(logits_of(outputs), labels[places], label_smoothing=label_smoothing, places=places)


def logits_of(outputs: Any) -> Any:
    """The logits of a model's outputs: the tensor itself, or its `.logits`."""
    return getattr(outputs, "logits", outputs)


def places_of(labels: torch.Tensor) -> torch.Tensor:
    """Where flattened labels have one: int64 [N].

    On a GPU the host waits here to learn N. That costs it the lead it has over the device; without it, softmax and its
    gradient run in fp32 over all places, seven times as many, with several copies of [B, S, V].
    """
    return (labels.flatten() != IGNORE).nonzero().squeeze(1)


def token_terms(
    logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float, places: torch.Tensor | None = None
) -> LossTerms:
    """The loss terms of some places of a batch.

    Args:
        logits: [..., V], whole or, under tensor parallel, cut along V.
        labels: int64 [N], IGNORE where there is no target.
        label_smoothing: as in `causal_lm`.
        places: int64 [N], the places of the labels among all of the logits; None: all of them.
    """
    smoothing = label_smoothing if torch.is_grad_enabled() else 0.0
    count = (labels != IGNORE).sum()
    if is_cut_logits(logits):
        cut = CutLogits(logits)
        loss = cut.losses(labels, ignore=IGNORE, label_smoothing=smoothing, places=places).sum()
        likely = None if torch.is_grad_enabled() else cut.argmax(places=places)
    else:
        rows = logits.flatten(0, -2) if places is None else logits.flatten(0, -2)[places]
        loss = summed_cross_entropy(rows, labels, ignore=IGNORE, label_smoothing=smoothing)
        likely = None if torch.is_grad_enabled() else rows.argmax(-1)
    return LossTerms(loss, count, {} if likely is None else {"correct": (likely == labels).sum()})
