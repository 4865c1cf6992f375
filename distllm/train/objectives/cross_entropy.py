"""Cross entropy of whole logits with one buffer of their size where torch's own has three.

Shapes: N places, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from distllm.parallel.loss import at_least_fp32, less_targets_


def summed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, ignore: int, label_smoothing: float = 0.0
) -> torch.Tensor:
    """The sum of -log p(label) over all places, in fp32, or fp64 where the logits are.

    The probabilities that the forward pass computes become the gradient, in their own memory. `F.cross_entropy` keeps
    log-probabilities and makes two more buffers from them in the backward pass. With a large vocabulary these are a
    training step's largest tensors. The graph may be gone through once; a second time is an error of autograd's.

    Args:
        logits: [N, V].
        labels: int64 [N], `ignore` at places without a target: their loss and gradient are 0.
        ignore: that label.
        label_smoothing: the share of the target's probability spread over all of V.

    Returns:
        A scalar.
    """
    total: torch.Tensor = _outside_graph(logits, labels, ignore, label_smoothing)
    return total


@torch.compiler.disable
def _outside_graph(*args: Any) -> Any:
    return _CrossEntropy.apply(*args)


class _CrossEntropy(torch.autograd.Function):
    """loss[n] = log sum exp x[n] - (1 - e) x[n, label] - e mean(x[n]), e the smoothing; its gradient is softmax - target."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignore: int, smoothing: float) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        p = torch.softmax(logits, -1, dtype=dtype)
        counts = labels != ignore
        column = torch.where(counts, labels, 0)[:, None]
        most = logits.amax(1, keepdim=True).to(dtype)
        # The largest logit less the logarithm of its probability is log sum exp, and no other pass over the logits is needed.
        # All is told from the largest logit on: next to it, a large logit's last digits would be lost.
        losses = -(logits.gather(1, column).to(dtype) - most) * (1 - smoothing) - p.amax(1, keepdim=True).log()
        if smoothing:
            losses -= smoothing * (at_least_fp32(logits) - most).mean(1, keepdim=True)
        ctx.save_for_backward(p, column, counts)
        ctx.smoothing, ctx.dtype = smoothing, logits.dtype
        return torch.where(counts, losses.squeeze(1), 0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad, column, counts = ctx.saved_tensors
        weights = torch.where(counts, grads[0], 0)
        less_targets_(grad, column, own=counts, weights=weights, smoothing=ctx.smoothing, vocabulary=grad.shape[1])
        return grad.to(ctx.dtype), None, None, None
