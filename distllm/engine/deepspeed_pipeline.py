"""DeepSpeed's pipeline: its schedule, sends and receives over stages that we have cut.

Its engine takes a whole step: it means losses over micro-batches, adds gradients of tied parameters by layers of its own,
and updates. We let it do the passes and the reduction over data-parallel ranks, and come between: the loss *sum* goes
backward, tied gradients are added by the names of our cut, and the update waits until the count of all targets is known.

What is used of DeepSpeed beyond its documented surface (0.19): the instructions of its 1F1B schedule, and the calls that
carry them out.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from distllm import comm
from distllm.data.batch import Batch
from distllm.engine.base import LossTerms, Objective
from distllm.parallel.equal_shapes import equal_shapes
from distllm.parallel.mesh import Mesh
from distllm.parallel.parallelize import Parallel
from distllm.parallel.pipeline import PipelinedModel
from distllm.parallel.tensor import whole_logits

AFTER_PASSES = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")
"""DeepSpeed's instructions that follow the last backward pass."""


class PipelinePasses:
    """Every rank computes with its stage; all pipeline ranks are given the same micro-batches. See `Passes`."""

    def __init__(self, engine: Any, mesh: Mesh, *, device: torch.device, parallel: Parallel) -> None:
        """Args:
        engine: DeepSpeed's, of a `PipelineModule` whose layers are the stages.
        mesh: the ranks by axis.
        device: where this rank computes.
        parallel: this rank's stage.
        """
        assert parallel.pipeline is not None
        self._engine, self._mesh, self._device = engine, mesh, device
        self._pipeline, (self._stage,) = parallel.pipeline, parallel.pipeline.stages
        self._shape: tuple[int, ...] | None = None
        engine._compute_loss = False  # the last stage returns its loss itself
        for name in parallel.pipeline.facts.tied:
            if name in parallel.copies:  # in the norm it counts on the first stage
                self._stage.module.get_parameter(name).ds_pipe_replicated = True  # type: ignore[attr-defined]

    def train(self, microbatches: Sequence[Batch], objective: Objective, *, scale: float) -> torch.Tensor:
        """See `Passes`."""
        engine, pipeline, slot = self._engine, self._pipeline, self._stage.slot
        assert len(microbatches) == engine.micro_batches, "DeepSpeed's schedule is for a fixed number of micro-batches"
        engine.train()
        batches = equal_shapes([batch.to(self._device) for batch in microbatches], pad_id=pipeline.facts.pad_id)
        total = torch.zeros(2, dtype=torch.float64, device=self._device)

        def loss(outputs: Any, batch: Batch) -> torch.Tensor:
            terms = objective(outputs, batch)
            total.add_(torch.stack([terms.sum.detach().double(), terms.count.double()]))
            return terms.sum * (scale * len(batches))  # DeepSpeed divides by them

        slot.waiting.clear()
        slot.waiting.extend(batches)
        slot.finish = loss
        self._expect(batches[0].inputs["input_ids"].shape)
        engine.total_loss = None
        nothing = pipeline.nothing()  # the slot has the inputs, and the targets
        engine.set_dataiterator(iter([(nothing, nothing)] * len(batches)))
        engine._exec_schedule(_Passes(engine._train_schedule()))
        pipeline.sum_tied_gradients()
        total = comm.sum_over(pipeline.from_last(total), self._mesh.loss_group)
        self._spoil(torch.isfinite(total[0] / total[1]))
        engine._exec_reduce_grads()
        return total

    def step(self) -> None:
        """See `Passes`."""
        self._engine._exec_optimizer_step()

    def evaluate(self, batch: Batch, objective: Objective) -> LossTerms:
        """See `Passes`."""
        self._engine.eval()
        return LossTerms(*self._pipeline.evaluate(batch.to(self._device), objective))

    @contextlib.contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """See `Passes`."""
        self._engine.eval()
        with whole_logits(self._stage.module):
            yield PipelinedModel(self._pipeline)

    def _expect(self, shape: tuple[int, ...]) -> None:
        """Let stages tell each other anew what they send, where the micro-batches [B, S] are not as in the last step."""
        if shape != self._shape:
            self._engine.reset_activation_shape()
            self._shape = shape

    def _spoil(self, finite: torch.Tensor) -> None:
        """Let every stage's gradient tell that the global loss is not finite, or ranks would part."""
        gradient = next(p.grad for p in self._stage.module.parameters() if p.grad is not None)
        gradient.mul_(torch.where(finite, 1.0, torch.nan))


class _Passes:
    """A schedule of DeepSpeed without what follows the last backward pass."""

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule

    def num_pipe_buffers(self) -> int:
        """How many micro-batches are on their way at once."""
        number: int = self._schedule.num_pipe_buffers()
        return number

    def __iter__(self) -> Iterator[list[Any]]:
        for instructions in self._schedule:
            yield [instruction for instruction in instructions if instruction.name not in AFTER_PASSES]
