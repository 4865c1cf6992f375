"""How micro-batches go through a model that DeepSpeed holds: the seam at which its pipeline stands in for the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from distllm import comm
from distllm.data.batch import Batch
from distllm.engine.base import LossTerms, Objective
from distllm.parallel.mesh import Mesh
from distllm.parallel.tensor import whole_logits


class Passes(Protocol):
    """Takes micro-batches through the model, with all ranks of it together."""

    def train(self, microbatches: Sequence[Batch], objective: Objective, *, scale: float) -> torch.Tensor:
        """Forward and backward, in training mode: leaves in DeepSpeed the gradients of the scaled loss sums.

        They are added over micro-batches and over the ranks that read different samples, and divided by the number of these.
        Where the global loss is not finite, they are not either, on every rank.

        Args:
            microbatches: this rank's of one global batch, on any device.
            objective: (outputs, batch) -> LossTerms.
            scale: what each loss sum is multiplied by before it goes backward.

        Returns:
            [loss sum, count] of the global batch in fp64, where any count is exact, unscaled, the same on every rank.
        """
        ...

    def step(self) -> None:
        """The update that follows `train`, by DeepSpeed's optimizer and its present loss scale."""
        ...

    def evaluate(self, batch: Batch, objective: Objective) -> LossTerms:
        """The loss terms of one micro-batch of this rank, in eval mode; called without gradients."""
        ...

    def inference(self) -> AbstractContextManager[nn.Module]:
        """The model as text is written with it, in eval mode; called without gradients."""
        ...


class WholeModel:
    """Every rank computes with all layers."""

    def __init__(self, engine: Any, mesh: Mesh, *, device: torch.device) -> None:
        """Args:
        engine: DeepSpeed's.
        mesh: the ranks by axis.
        device: where this rank computes.
        """
        self._engine, self._mesh, self._device = engine, mesh, device

    def train(self, microbatches: Sequence[Batch], objective: Objective, *, scale: float) -> torch.Tensor:
        """See `Passes`."""
        self._engine.train()
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        for index, batch in enumerate(microbatches):
            is_last = index == len(microbatches) - 1
            self._engine.set_gradient_accumulation_boundary(is_last)
            here = batch.to(self._device)
            terms = objective(self._engine(**here.inputs), here)
            total += torch.stack([terms.sum.detach().double(), terms.count.double()])
            loss = terms.sum * scale
            if is_last:  # every rank's gradient shall tell what the global loss is, or ranks would part
                comm.sum_over(total, self._mesh.loss_group)
                loss = loss * torch.where(torch.isfinite(total[0] / total[1]), 1.0, torch.nan)
            self._engine.backward(loss, scale_wrt_gas=False)
        return total

    def step(self) -> None:
        """See `Passes`."""
        self._engine.step()

    def evaluate(self, batch: Batch, objective: Objective) -> LossTerms:
        """See `Passes`."""
        self._engine.eval()
        here = batch.to(self._device)
        return objective(self._engine.module(**here.inputs), here)

    @contextlib.contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """See `Passes`."""
        self._engine.eval()
        with whole_logits(self._engine.module):
            yield self._engine.module
