"""Evaluation: sums over all samples of all ranks, and the figures that they give, whatever the split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from distllm.comm import gather_over, sum_over
from distllm.config.errors import DataError
from distllm.data.batch import Batch
from distllm.engine.base import LossTerms

Figures = Callable[["Totals"], dict[str, float]]
"""Totals -> figures by name, `loss` apart."""


@dataclass(frozen=True)
class Totals:
    """The sums of an evaluation over all batches and ranks, fp64 on the CPU."""

    sum: float
    count: float
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By name, as an objective gives them: scalars and small tensors, such as a confusion matrix."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; the same on every rank of the group."""

    loss: float
    """Nats a target."""
    count: float
    """Targets: tokens, or labelled samples."""
    figures: Mapping[str, float]
    """What the task measures besides, by name: accuracy, perplexity, f1_macro, ..."""
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The sums behind the figures."""

    def as_metrics(self) -> dict[str, float]:
        """The figures under their names in `metrics.jsonl`."""
        return {"val_loss": self.loss, **{f"val_{name}": value for name, value in self.figures.items()}}


def evaluate(
    eval_step: Callable[[Batch], LossTerms],
    batches: Iterable[Batch],
    *,
    figures: Figures,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Evaluation:
    """Run `batches` through `eval_step` and add up.

    The sums stay on the device in fp64 until all batches are through, so no batch waits for the one before; then one
    all-reduce over `group`. Ranks may have different numbers of batches as far as this function goes; an `eval_step`
    that communicates (sharded parameters) needs the same number on each.

    Args:
        eval_step: gives this rank's sums of one micro-batch; an engine's, or any model's.
        batches: this rank's micro-batches. Padding has no weight.
        figures: what the task makes of the sums.
        group: the data-parallel ranks; None is a group of one.
        device: where the sums live.

    Returns:
        The figures over all ranks.

    Raises:
        DataError: no rank had a target.
    """
    main = torch.zeros(2, dtype=torch.float64, device=device)  # sum, count
    parts: dict[str, torch.Tensor] = {}
    for batch in batches:
        terms = eval_step(batch.to(device))
        main[0] += terms.sum.detach()
        main[1] += terms.count
        for name, part in terms.parts.items():
            parts[name] = parts[name] + part if name in parts else part.to(torch.float64)
    totals = _over_ranks(main, parts, group)
    if totals.count == 0:
        raise DataError("evaluation: the validation data have no target; give more text or a larger fraction")
    return Evaluation(totals.sum / totals.count, totals.count, figures(totals), totals.parts)


def _over_ranks(main: torch.Tensor, parts: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> Totals:
    """Add the sums over the ranks: each saw other samples. A rank without a batch does not know the parts' names yet."""
    shapes: dict[str, tuple[int, ...]] = {}
    for known in gather_over({name: tuple(part.shape) for name, part in parts.items()}, group):
        shapes |= known
    flat = [main, *(parts[n].flatten() if n in parts else main.new_zeros(shapes[n]).flatten() for n in sorted(shapes))]
    sizes = [len(piece) for piece in flat]
    summed = sum_over(torch.cat(flat), group).cpu().split(sizes)
    rest = {name: piece.reshape(shapes[name]) for name, piece in zip(sorted(shapes), summed[1:], strict=True)}
    return Totals(float(summed[0][0]), float(summed[0][1]), rest)
