"""The gradient noise scale: how large a batch is before its gradient hardly gets better.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1. The mean gradient over B samples has E|G_B|^2 = |G|^2 + tr(S) / B,
with G the true gradient and S the covariance of one sample's. Two sizes of B solve that for |G|^2 and tr(S), without bias
and although the small batch is a part of the large one; the noise scale is tr(S) / |G|^2, in samples.

The large batch is the step's global batch. The small one is the first micro-batch, as far as its gradient has been added
over ranks by then, which costs nothing but a norm:

| layout           | small batches                                      | targets in one             |
|------------------|----------------------------------------------------|----------------------------|
| one process      | its first micro-batch                              | those of the micro-batch   |
| DDP              | the first micro-batch of each replica, not yet sent | those of one rank          |
| FSDP             | the first micro-batches of all ranks, together     | those of all ranks         |
| HSDP             | those of one shard group, for each group           | those of the group's ranks |

Several small batches of c_s targets with summed gradients g_s are put together as sum(|g_s|^2 / c_s) / sum(c_s). Its
expectation is |G|^2 + n * tr / sum(c_s) for n batches, so they count as one of sum(c_s) / n targets, with less variance;
and one without a target drops out. Targets become samples by the targets per sample of the global batch.
"""

from __future__ import annotations

import torch

from distllm import comm
from distllm.engine.local import LocalParameters, squared_norm_of
from distllm.parallel.data import held_back_gradients
from distllm.parallel.parallelize import Parallel


def small_batches(parallel: Parallel, parameters: LocalParameters, *, count: torch.Tensor) -> torch.Tensor:
    """Measure the gradient so far, after the first micro-batch and before the second; a collective call.

    Args:
        parallel: the model on its mesh.
        parameters: refreshed after the backward pass.
        count: the targets of this rank's micro-batch, a scalar.

    Returns:
        [3]: sum over small batches of |g|^2 / c, their targets, and how many there are.
    """
    groups = [None if (m := parallel.mesh.submesh(axis)) is None else m.get_group() for axis in ("dp_shard", "dp_replicate")]
    shards, replicas = groups
    targets = comm.sum_over(count.detach().float().clone(), shards)  # FSDP has added the gradients of these ranks
    if held := held_back_gradients(parallel.model):
        square = comm.sum_over(squared_norm_of(held), shards)  # each rank holds a part of the group's gradient
    else:
        square = parameters.squared_norm()
    some = targets > 0
    measured = torch.stack([torch.where(some, square / targets, 0.0), targets, some.float()])
    return comm.sum_over(measured, replicas)  # each replica has seen other samples


def noise_estimates(
    small: torch.Tensor, *, norm: torch.Tensor, count: torch.Tensor, samples: int, scale: float
) -> torch.Tensor:
    """The two estimates of one step; either may be negative, only their means are meaningful.

    Args:
        small: [3], what `small_batches` gave.
        norm: the norm of the global batch's mean gradient, a scalar.
        count: its targets, a scalar.
        samples: its samples.
        scale: by which the gradients were multiplied when `small` was measured.

    Returns:
        [2]: the squared norm of the true gradient, and the trace of the covariance of one sample's gradient.
    """
    small_square, large_square = small[0] / small[1] / scale**2, norm.square()
    small_size, large_size = small[1] / small[2] * (samples / count), float(samples)
    squared_norm = (large_size * large_square - small_size * small_square) / (large_size - small_size)
    variance = (small_square - large_square) / (1.0 / small_size - 1.0 / large_size)
    return torch.stack([squared_norm, variance])
