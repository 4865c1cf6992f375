"""Cross entropy of logits that are cut along the vocabulary: only numbers of each place travel, never logits.

Shapes: N places, V vocabulary, T ranks; v the columns of one rank, V/T or less.
Source: Shoeybi et al. 2019, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from distllm.parallel.tensor_params import piece_range


def is_cut_logits(logits: Any) -> TypeGuard[DTensor]:
    """Whether logits [..., V] are cut along the vocabulary, as a head under tensor parallel leaves them."""
    return isinstance(logits, DTensor) and logits.placements == (Shard(logits.dim() - 1),)


class CutLogits:
    """Logits [..., V] of which each rank has some columns."""

    def __init__(self, logits: DTensor) -> None:
        """Args:
        logits: [..., V], cut along V on a mesh of one axis.
        """
        mesh = logits.device_mesh
        self.group, self.vocabulary = mesh.get_group(), logits.shape[-1]
        self.first, self.last = piece_range(self.vocabulary, pieces=mesh.size(), index=mesh.get_local_rank())
        self.part = logits.to_local(grad_placements=logits.placements)
        """This rank's columns [..., v]."""

    def rows(self, places: torch.Tensor | None = None) -> torch.Tensor:
        """The columns of all places [N, v], or of those with these numbers."""
        flat = self.part.flatten(0, -2)
        return flat if places is None else flat[places]

    def losses(
        self, labels: torch.Tensor, *, ignore: int, label_smoothing: float = 0.0, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """-log p(label) of each place, in fp32, or fp64 where the logits are.

        Args:
            labels: int64 [N], equal on all ranks.
            ignore: the label of places without a target: their loss and gradient are 0.
            label_smoothing: the share of the target's probability spread over all of V.
            places: the numbers of the N places among all; None: all.

        Returns:
            [N], equal on all ranks; each rank's gradient is that of its own columns.
        """
        losses: torch.Tensor = _outside_graph(self.rows(places), labels, self, ignore, label_smoothing)
        return losses

    @torch.no_grad()
    def argmax(self, *, places: torch.Tensor | None = None) -> torch.Tensor:
        """The most likely token of each place, int64 [N]; of equal ones the first, as `torch.argmax` takes it here."""
        part = self.rows(places)
        best, index = _column_max(part)
        most = best.clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        token = torch.where(best == most, index + self.first, self.vocabulary)
        dist.all_reduce(token, op=dist.ReduceOp.MIN, group=self.group)
        return token


@torch.compiler.disable
def _outside_graph(*args: Any) -> Any:
    return _CrossEntropy.apply(*args)


class _CrossEntropy(torch.autograd.Function):
    """losses[n] = log sum exp x[n] - (1 - e) x[n, label] - e mean(x[n]), e the smoothing; its gradient is softmax - target."""

    @staticmethod
    def forward(
        ctx: Any, part: torch.Tensor, labels: torch.Tensor, cut: CutLogits, ignore: int, smoothing: float
    ) -> torch.Tensor:
        x = at_least_fp32(part)  # [N, v]
        most, _ = _column_max(x)
        # Every rank takes the same number off before exp, so that their sums fit together. It stays off: next to it, a
        # large logit's last digits would be lost in fp32.
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=cut.group)
        x = x - most[:, None]
        own = (labels >= cut.first) & (labels < cut.last)
        column = torch.where(own, labels - cut.first, 0)[:, None]
        target = x.gather(1, column).squeeze(1) if x.shape[1] else x.new_zeros(len(labels))
        # The label stands on one rank: the sum over ranks is its logit. Sums of exp, and of all logits, add up too.
        sums = torch.stack([x.exp().sum(1), torch.where(own, target, 0), x.sum(1)])
        dist.all_reduce(sums, group=cut.group)
        log_sum, counts = sums[0].log(), labels != ignore
        ctx.save_for_backward(part, most, log_sum, column, own, counts)
        ctx.smoothing, ctx.vocabulary = smoothing, cut.vocabulary
        loss = log_sum - (1 - smoothing) * sums[1] - smoothing * sums[2] / cut.vocabulary
        return torch.where(counts, loss, 0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        part, most, log_sum, column, own, counts = ctx.saved_tensors
        grad = (at_least_fp32(part) - most[:, None]).sub_(log_sum[:, None]).exp_()  # [N, v]: this rank's columns of softmax
        weights = torch.where(counts, grads[0], 0)
        less_targets_(grad, column, own=own, weights=weights, smoothing=ctx.smoothing, vocabulary=ctx.vocabulary)
        return grad.to(part.dtype), None, None, None, None


def less_targets_(
    p: torch.Tensor, column: torch.Tensor, *, own: torch.Tensor, weights: torch.Tensor, smoothing: float, vocabulary: int
) -> None:
    """Turn probabilities into the gradient of cross entropy, in place: softmax - target, times a weight for each place.

    Args:
        p: [N, v], some columns of softmax.
        column: int64 [N, 1], where the label stands in `p`, any column where it does not.
        own: bool [N], whether it stands there.
        weights: [N], the gradients of the losses, 0 for places that do not count.
        smoothing: the share of the target's probability spread over all of V.
        vocabulary: V.
    """
    if smoothing:
        p -= smoothing / vocabulary
    if p.shape[1]:
        p.scatter_add_(1, column, own.to(p.dtype)[:, None] * (smoothing - 1.0))
    p *= weights[:, None]


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32, or as it is in fp64; always a tensor that may be read only."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _column_max(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row [N, v] and its column; of no columns, minus infinity and 0."""
    if part.shape[1]:
        return part.max(1)
    return part.new_full((part.shape[0],), -torch.inf), torch.zeros(part.shape[0], dtype=torch.int64, device=part.device)
