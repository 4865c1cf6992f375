"""The DeepSpeed engine: ZeRO 1, 2 and 3 under the step, the objective, the schedule and the checkpoints of the native one.

DeepSpeed means gradients over ranks; we want their sum over all targets, divided once. So each micro-batch's loss *sum*
goes backward, and what DeepSpeed then holds is the sum over micro-batches and ranks divided by the ranks. Its static loss
scale is by what it divides gradients and norm before it clips and updates; setting it to targets / ranks for that moment
makes the one division. The clip factor is then that of the true norm.

fp16 has the loss scale of the native engine (scaler.py), which multiplies each loss sum and the divisor. DeepSpeed's own
dynamic scale would be changed by the division that its static one makes for us; it also shrinks only at every second
overflow, ends the run at scale 1, and is no part of a checkpoint that the native engine reads. So DeepSpeed is told a static one.

ZeRO keeps fp32 weights and optimizer state as flat pieces, of which each rank has one. A checkpoint gets them as boxes of
the tensors under their own names (flat.py), so that either engine reads what the other wrote. After a load the weights
that the model computes with are made from them anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distllm.checkpoint.chunk import Chunk
from distllm.comm import World
from distllm.config.schema import PrecisionConfig
from distllm.data.batch import Batch
from distllm.engine.base import LossTerms, Objective, Skipped, StepOut
from distllm.engine.deepspeed_passes import Passes, WholeModel
from distllm.engine.deepspeed_pieces import Pieces
from distllm.engine.deepspeed_start import initialize
from distllm.engine.local import LocalParameters
from distllm.engine.scaler import LossScale
from distllm.engine.stages import owners_in_order, send_to_first
from distllm.parallel.mesh import AXES, Mesh
from distllm.parallel.tensor_plain import TensorPiece

Tensors = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""A call gives every parameter and buffer by name, whole, on the CPU."""


class DeepSpeedEngine:
    """Trains a model over which DeepSpeed's ZeRO is laid.

    The host waits for every step: DeepSpeed reads the norm there. A step that is not finite on any rank leaves weights,
    optimizer state and schedule as they were. One engine a process: several in one were seen to hang.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        json: Mapping[str, Any],
        tensors: Tensors,
        objective: Objective,
        optimizer: Callable[[LocalParameters], torch.optim.Optimizer],
        schedule: Callable[[int], float],
        precision: PrecisionConfig,
        world: World,
        mesh: Mesh,
        loss_unit: float = 1.0,
        cuts: Mapping[str, TensorPiece] | None = None,
        blocks: Sequence[nn.Module] = (),
        passes: Callable[..., Passes] = WholeModel,
        copies: frozenset[str] = frozenset(),
    ) -> None:
        """Args:
        model: with its first weights in fp32, on the world's device.
        json: DeepSpeed's configuration.
        tensors: the first weights, from which the fp32 pieces are filled; the model's own are rounded by then.
        objective: (outputs, batch) -> LossTerms.
        optimizer: makes the optimizer of the parameters; it must treat each number by itself.
        schedule: update number (from 0) -> learning rate.
        precision: the dtype of the products and the fp16 loss scale.
        world: this rank's facts; its process group has been started.
        mesh: the ranks by axis. ZeRO cuts over those that read different samples.
        loss_unit: fp16: what a loss sum is divided by before it is scaled, about the targets of a micro-batch, so that
            the loss scale is that of a mean; the same on every rank.
        cuts: where this rank's pieces of the parameters lie that tp has cut, by name; None: it has cut none.
        blocks: the model's, in order.
        passes: (DeepSpeed's engine, mesh, device=...) -> what takes micro-batches through the model.
        copies: names of what another pipeline stage holds too and answers for.

        Raises:
            ConfigError: DeepSpeed does not do what it was told.
        """
        self.updates = 0
        self.skips_in_a_row = 0
        self.unused: tuple[str, ...] | None = ()  # DeepSpeed does not tell
        self.device, self._world = world.device, world
        self._objective, self._schedule = objective, schedule
        self._model, self._mesh, self._copies, self._loss_unit = model, mesh, copies, loss_unit
        self._scale = LossScale(precision) if precision.compute == "fp16" else None
        own = optimizer(LocalParameters(model))
        self._engine = initialize(model, own, json=json, world=world, mesh=mesh, blocks=blocks)
        self._passes = passes(self._engine, mesh, device=world.device)
        self._pieces = Pieces(
            self._engine, model, stage=json["zero_optimization"]["stage"], mesh=mesh, cuts=cuts or {}, copies=copies
        )
        self._pieces.make_optimizer_state()
        self._loaded = False
        self.parts_are_shared = json["zero_optimization"]["stage"] == 3
        if precision.compute != "fp32":
            self._pieces.fill(tensors())

    def train_step(self, microbatches: Sequence[Batch], *, samples: range, noise: bool = False) -> StepOut:
        """Take one optimizer step on this rank's micro-batches of one global batch; `noise` is not measured."""
        self._follow_pieces()
        optimizer = self._engine.optimizer
        optimizer.loss_scale = 1.0
        scale = self._scale.value / self._loss_unit if self._scale else 1.0
        total = self._passes.train(microbatches, self._objective, scale=scale)
        mean, count = (total[0] / total[1]).float(), float(total[1])
        lr = self._schedule(self.updates)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.loss_scale = count * scale / self._mesh.dp_size if count > 0 else 1.0
        self._passes.step()
        norm = torch.as_tensor(torch.nan if optimizer.overflow else self._engine.get_global_grad_norm(), dtype=torch.float32)
        return StepOut(mean, norm.to(self.device), lr, self._count(mean, bad=bool(optimizer.overflow), samples=samples))

    def _count(self, loss: torch.Tensor, *, bad: bool, samples: range) -> tuple[Skipped, ...]:
        """Note whether the step was taken."""
        forgiven = self._scale.update(not bad) if self._scale else False
        if not bad:
            self.updates += 1
            self.skips_in_a_row = 0
            return ()
        self.skips_in_a_row += 0 if forgiven else 1  # fp16: too large a scale is no sign of divergence
        what = "gradient" if bool(torch.isfinite(loss)) else "loss"
        return (Skipped(samples, f"the {what} is not finite"),)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's, whose parameters are this rank's flat pieces."""
        found: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return found

    @property
    def step(self) -> int:
        """Updates taken; every verdict is known."""
        return self.updates

    def settle(self) -> tuple[Skipped, ...]:
        """Nothing: each step tells its own verdict."""
        return ()

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> LossTerms:
        """The loss terms of one micro-batch of this rank, without gradients, in eval mode."""
        self._follow_pieces()
        return self._passes.evaluate(batch, self._objective)

    @contextlib.contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The model as text is written with it; at stage 3 it answers only when every rank calls it."""
        self._follow_pieces()
        with torch.no_grad(), self._passes.inference() as model:
            yield model

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Nothing: this engine keeps no moving average."""
        yield

    def restart_average(self) -> None:
        """Nothing: this engine keeps no moving average."""

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Chunk]:
        """The checkpoint state of this rank, under the names of the native engine."""
        chunks = self._pieces.chunks()
        first = self._mesh.first_of(*(axis for axis in AXES if axis != "pp"))
        for name, buffer in self._buffers():
            write = first and name not in self._copies
            chunks[f"model.{name}"] = Chunk(buffer, tuple(buffer.shape), (0,) * buffer.dim(), write)
        return chunks

    def facts(self) -> dict[str, Any]:
        """The engine's scalars, JSON."""
        facts: dict[str, Any] = {"updates": self.updates, "skips_in_a_row": self.skips_in_a_row}
        return facts | ({"loss_scale": self._scale.state()} if self._scale else {})

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over the scalars of a checkpoint; its tensors are loaded into what `state` gives."""
        self.updates, self.skips_in_a_row = facts["updates"], facts["skips_in_a_row"]
        if self._scale and "loss_scale" in facts:
            self._scale.restore(facts["loss_scale"])
        self._loaded = True

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and persistent buffer by name, whole, in fp32, on the CPU of rank 0, one at a time."""
        buffers = dict(self._buffers())
        mine = [name for name in (*self._pieces.names, *buffers) if name not in self._copies]
        group = self._mesh.group("pp")
        for name, owner in owners_in_order(mine, group):
            whole = None
            if name in mine:
                whole = buffers[name].detach() if name in buffers else self._pieces.whole(name, device=self.device)
            if group is not None:
                whole = send_to_first(whole, owner=owner, group=group, device=self.device)
            yield name, whole.cpu() if self._world.is_main and whole is not None else torch.empty(0)

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The persistent buffers by name."""
        for prefix, module in self._model.named_modules():
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    yield name, buffer

    def _follow_pieces(self) -> None:
        """Make the weights from the fp32 pieces, where a checkpoint was loaded into these; a collective call."""
        if self._loaded:
            self._pieces.to_weights()
            self._loaded = False
        self._pieces.forget_copies()
