"""Pipeline parallelism: stages of a model on the pp ranks, run by the schedules of torch.distributed.pipelining.

The micro-batches of the engine are those of the pipeline. Losses are sums and nothing is averaged, so micro-batches with
different numbers of targets are weighted right. Between two stages travel the hidden states of one micro-batch, forward, and
their gradient, backward: 2·B·S·D elements per boundary and micro-batch.

Shapes: B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
    _PipelineScheduleRuntime,
)
from torch.distributed.tensor import DTensor

from distllm.config.check_pipeline import needs_gathered
from distllm.data.batch import Batch
from distllm.parallel.cut import Stage
from distllm.parallel.equal_shapes import equal_shapes

SINGLE: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
MULTI: dict[str, type[PipelineScheduleMulti]] = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What logits may be in; a rank tells the others by the place here."""


@dataclass(frozen=True)
class Facts:
    """What all ranks of a pipeline know of it."""

    schedule: str
    """A key of SINGLE or MULTI, or csv."""
    owners: tuple[int, ...]
    """For each stage the pp rank that holds it."""
    width: int
    """D, the width of what travels between stages."""
    dtype: torch.dtype
    """What it travels in: the dtype of the hidden states between blocks."""
    csv: str | None = None
    """For csv: the file, in torch's compute-only format, a line a rank."""
    sequence_shards: int = 1
    """Into how many parts sequence parallelism cuts the hidden states along S."""
    tied: tuple[str, ...] = ()
    """Parameters that the first and the last stage both hold, by name."""
    pad_id: int = 0
    """What fills up the input_ids of micro-batches that are shorter than others of their step."""


class Pipeline:
    """Runs the stages of this rank; every pp rank makes the same calls with the same batches.

    Gradients are left in `.grad` as sums over the micro-batches, those of tied parameters over both stages too. FSDP adds
    gradients over its ranks once, after the last micro-batch; until then a rank holds the whole gradients of its stages.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        facts: Facts,
        group: dist.ProcessGroup,
        device: torch.device,
        context: Callable[[Batch], AbstractContextManager[Any]] | None = None,
    ) -> None:
        """Args:
        stages: those of this rank, in the order of the forward pass.
        facts: what all ranks know.
        group: the pp ranks.
        device: where this rank computes.
        context: what the forward pass of a batch runs in, such as autocast; None: nothing.
        """
        self.stages, self.facts, self.group, self.device = tuple(stages), facts, group, device
        self.rank = dist.get_rank(group)
        self._made_for: tuple[int, ...] | None = None
        self._torch_stages: list[PipelineStage] = []
        self._schedule: Any = None
        self._part_shapes: dict[str, tuple[int, ...]] | None = None
        for stage in stages:
            stage.slot.dtype = facts.dtype
            if context is not None:
                stage.slot.context = context
            if needs_gathered(facts.schedule):
                _keep_gathered(stage.module)

    def train(
        self, batches: Sequence[Batch], terms: Callable[[Any, Batch], Any], *, scale: float = 1.0
    ) -> torch.Tensor:
        """Run forward and backward of all micro-batches of a step.

        Args:
            batches: the micro-batches, on the device; the same on every pp rank.
            terms: (outputs, batch) -> LossTerms; called on the last stage.
            scale: what a loss sum is multiplied by before the backward pass (fp16).

        Returns:
            [loss sum, count] over the micro-batches, [2] fp64, the same on every pp rank.
        """
        self.share_tied_weights()
        batches = equal_shapes(batches, pad_id=self.facts.pad_id)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        loss_dtype = self._loss_dtype()

        def loss(outputs: Any, batch: Batch) -> torch.Tensor:
            found = terms(outputs, batch)
            total.add_(torch.stack([found.sum.detach().double(), found.count.double()]))
            scaled: torch.Tensor = (found.sum * scale).to(loss_dtype)
            return scaled

        self._run_schedule(batches, loss)
        self.sum_tied_gradients()
        return self.from_last(total)

    @torch.no_grad()
    def evaluate(
        self, batch: Batch, terms: Callable[[Any, Batch], Any]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The loss terms of one batch, of any shape, without gradients.

        Args:
            batch: on the device; the same on every pp rank.
            terms: (outputs, batch) -> LossTerms; called on the last stage.

        Returns:
            sum, count and parts (of any shape), each fp64, the same on every pp rank.
        """
        found: list[Any] = []

        def keep(outputs: Any, batch: Batch) -> torch.Tensor:
            found.append(terms(outputs, batch))
            return torch.empty(0)

        self._forward(batch, keep)
        shapes = {name: tuple(part.shape) for name, part in found[0].parts.items()} if found else {}
        if self._part_shapes is None:
            told = [shapes]
            dist.broadcast_object_list(told, group_src=self.facts.owners[-1], group=self.group, device=torch.device("cpu"))
            self._part_shapes = told[0]
        sizes = [prod(shape) for shape in self._part_shapes.values()]
        values = torch.zeros(2 + sum(sizes), dtype=torch.float64, device=self.device)
        if found:
            assert shapes == self._part_shapes, "an objective makes the same parts of every batch"
            values = torch.cat([v.double().reshape(-1) for v in (found[0].sum, found[0].count, *found[0].parts.values())])
        total, count, *parts = self.from_last(values).split([1, 1, *sizes])
        named = zip(self._part_shapes.items(), parts, strict=True)
        return total.squeeze(0), count.squeeze(0), {name: part.view(shape) for (name, shape), part in named}

    @torch.no_grad()
    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The logits [B, S, V] of one batch of inputs, on every pp rank.

        Args:
            inputs: the model's keyword arguments, on the device; the same on every pp rank.
        """
        found: list[torch.Tensor] = []

        def keep(outputs: Any, batch: Batch) -> torch.Tensor:
            found.append(getattr(outputs, "logits", outputs).contiguous())
            return found[0]

        self._forward(Batch(inputs, {}, ()), keep)
        head = torch.zeros(8, dtype=torch.int64, device=self.device)  # [dtype, dims, sizes]
        if found:
            shape = found[0].shape
            head[: 2 + len(shape)] = torch.tensor([DTYPES.index(found[0].dtype), len(shape), *shape])
        kind, dims, *sizes = self.from_last(head).tolist()
        value = found[0] if found else torch.empty(sizes[:dims], dtype=DTYPES[kind], device=self.device)
        return self.from_last(value)

    # -- running ----------------------------------------------------------------------------------------------------

    def _run_schedule(self, batches: Sequence[Batch], loss: Callable[[Any, Batch], torch.Tensor]) -> None:
        """One step of torch's schedule. Stages find their inputs in their slots: torch would split one batch evenly."""
        self._make_schedule(len(batches), batches[0].inputs["input_ids"].shape)
        for stage in self.stages:
            stage.slot.waiting.clear()
            stage.slot.waiting.extend(batches)
            stage.slot.finish = loss
        for torch_stage in self._torch_stages:
            torch_stage.has_backward = True
            torch_stage.clear_runtime_states()
        # Not `step`: it splits one large batch, and these are of different weight.
        run = self._schedule._step_microbatches
        # The last stage would keep all its outputs; torch 2.11 has no such option.
        options = {"return_outputs": False} if "return_outputs" in inspect.signature(run).parameters else {}
        count = len(batches)
        run([(self.nothing(),)] * count, [{}] * count, list(range(count)), None, **options)

    def _make_schedule(self, count: int, shape: torch.Size) -> None:
        """Make torch's stages and schedule for `count` micro-batches of [B, S]; buffers have one shape for good."""
        if (count, *shape) == self._made_for:
            return
        facts = self.facts
        hidden = torch.empty(
            shape[0], shape[1] // facts.sequence_shards, facts.width, dtype=facts.dtype, device="meta", requires_grad=True
        )  # fmt: skip
        loss = torch.empty((), dtype=self._loss_dtype(), device="meta", requires_grad=True)
        last = len(facts.owners) - 1
        self._torch_stages = [
            _TorchStage(
                submodule=stage.module, stage_index=stage.index, num_stages=last + 1, device=self.device, group=self.group,
                # With both given, torch neither runs the stage once more nor sends pickled shapes.
                input_args=(self.nothing().to("meta") if stage.index == 0 else hidden,),
                output_args=(loss if stage.index == last else hidden,),
            )
            for stage in self.stages
        ]  # fmt: skip
        # The last stage returns its loss itself.
        options: dict[str, Any] = {"n_microbatches": count, "loss_fn": lambda loss, _: loss, "scale_grads": False}
        if facts.schedule in SINGLE:
            (stage,) = self._torch_stages
            self._schedule = SINGLE[facts.schedule](stage, **options)
        elif facts.schedule in MULTI:
            self._schedule = MULTI[facts.schedule](list(self._torch_stages), **options)
        else:
            assert facts.csv is not None
            self._schedule = _PipelineScheduleRuntime(self._torch_stages, **options)
            self._schedule._load_csv(facts.csv)
        self._made_for = (count, *shape)

    def _forward(self, batch: Batch, finish: Callable[[Any, Batch], torch.Tensor]) -> None:
        """One batch through all stages, forward only."""
        self.share_tied_weights()
        facts, mine = self.facts, {stage.index: stage for stage in self.stages}
        rows, columns = batch.inputs["input_ids"].shape
        hidden = self.nothing()
        for index, owner in enumerate(facts.owners):
            if owner != self.rank:
                continue
            if index > 0 and facts.owners[index - 1] != self.rank:
                hidden = torch.empty(
                    rows, columns // facts.sequence_shards, facts.width, dtype=facts.dtype, device=self.device
                )  # fmt: skip
                dist.recv(hidden, group_src=facts.owners[index - 1], group=self.group)
            slot = mine[index].slot
            slot.waiting.clear()
            slot.waiting.append(batch)
            slot.finish = finish
            hidden = mine[index].module(hidden)
            if index + 1 < len(facts.owners) and facts.owners[index + 1] != self.rank:
                dist.send(hidden, group_dst=facts.owners[index + 1], group=self.group)

    def nothing(self) -> torch.Tensor:
        """What the first stage is handed in place of hidden states; its dtype is what its stand-ins make zeros of."""
        return torch.zeros(1, dtype=self.facts.dtype, device=self.device)

    def _loss_dtype(self) -> torch.dtype:
        return torch.float64 if self.facts.dtype == torch.float64 else torch.float32

    def from_last(self, value: torch.Tensor) -> torch.Tensor:
        """Give every pp rank the last stage's `value`, in place."""
        dist.broadcast(value, group_src=self.facts.owners[-1], group=self.group)
        return value

    # -- tied parameters ----------------------------------------------------------------------------------------------

    def share_tied_weights(self) -> None:
        """Where one rank holds the first and the last stage: let the last one's copies be those of the first.

        The last one's are not in the optimizer or a checkpoint, so they follow. On two ranks both are updated, alike.
        """
        ends = self._both_ends()
        if ends is None or not self.facts.tied:
            return
        for stage in ends:
            _reshard(stage.module)
        with torch.no_grad():
            for name in self.facts.tied:
                mine, copy = (_local(stage.module.get_parameter(name)) for stage in ends)
                copy.copy_(mine)

    def sum_tied_gradients(self) -> None:
        """Add the gradients of tied parameters over the first and the last stage; both get the sum."""
        first, last = self.facts.owners[0], self.facts.owners[-1]
        if not self.facts.tied or self.rank not in (first, last):
            return
        if ends := self._both_ends():
            for name in self.facts.tied:
                mine, copied = (stage.module.get_parameter(name) for stage in ends)
                if mine.grad is not None and copied.grad is not None:
                    _local(mine.grad).add_(_local(copied.grad))
                copied.grad = None
            return
        other = last if self.rank == first else first
        stage = self.stages[0] if self.rank == first else self.stages[-1]
        for name in self.facts.tied:
            gradient = stage.module.get_parameter(name).grad
            if gradient is None:  # frozen, so on the other stage too
                continue
            local = _local(gradient)
            theirs = torch.empty_like(local)
            work = dist.batch_isend_irecv([
                dist.P2POp(dist.isend, local, group=self.group, group_peer=other),
                dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=other),
            ])  # fmt: skip
            for item in work:
                item.wait()
            local.add_(theirs)

    def _both_ends(self) -> tuple[Stage, Stage] | None:
        """The first and the last stage where this rank holds both, as in V schedules."""
        ends = self.stages[0], self.stages[-1]
        return ends if ends[0].index == 0 and ends[1].index == len(self.facts.owners) - 1 else None


class PipelinedModel(nn.Module):
    """The whole model as it answers: every pp rank calls it, with the same inputs, and gets the logits [B, S, V]."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage.module for stage in pipeline.stages])
        self._pipeline = pipeline

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._pipeline.logits({"input_ids": input_ids})


class _TorchStage(PipelineStage):
    """Without a message to itself: torch 2.11 begins with one between all neighbours, and gloo has no pair with oneself."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.peer != dist.get_rank()]


def _keep_gathered(module: nn.Module) -> None:
    """Make impossible what torch does silently: wrong gradients of parameters that FSDP frees between the two halves."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False, recurse=False)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter or gradient, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _reshard(module: nn.Module) -> None:
    """Put FSDP's shards back in the place of gathered parameters."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
