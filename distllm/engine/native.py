"""The torch-native engine: one process, DDP, FSDP2 and HSDP in one step function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distllm import comm
from distllm.checkpoint.chunk import Chunk, chunk_of
from distllm.config.errors import ConfigError
from distllm.config.schema import PrecisionConfig
from distllm.data.batch import Batch
from distllm.engine.base import LossTerms, Objective, Skipped, StepOut
from distllm.engine.ema import MovingAverage
from distllm.engine.local import LocalParameters, local_part
from distllm.engine.noise import noise_estimates, small_batches
from distllm.engine.scaler import LossScale
from distllm.engine.stages import owners_in_order, quiet_redistribution, send_to_first
from distllm.engine.verdict import Verdict
from distllm.parallel.balance import RouterWatch
from distllm.parallel.context import plain_attention
from distllm.parallel.data import set_last_microbatch
from distllm.parallel.parallelize import Parallel
from distllm.parallel.pipeline import PipelinedModel
from distllm.parallel.sequence import cut_batch
from distllm.parallel.tensor import whole_logits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class NativeEngine:
    """Trains a model laid out by `parallelize`.

    A step that is not finite on any rank leaves weights, optimizer state and schedule as they were. On a GPU with fused
    Adam or AdamW nothing waits for that verdict: the update kernel itself obeys it, and the host reads its copy at the
    next step, when it has long arrived. With other optimizers, and for the loss scale of fp16, the host waits each step.
    """

    def __init__(
        self,
        parallel: Parallel,
        *,
        objective: Objective,
        optimizer: Callable[[LocalParameters], torch.optim.Optimizer],
        schedule: Callable[[int], float],
        clip: float,
        penalty: Callable[[LocalParameters], None] | None,
        precision: PrecisionConfig,
        device: torch.device,
        rank: int,
        loss_unit: float = 1.0,
        ema: float = 0.0,
    ) -> None:
        """Args:
        parallel: the model with its weights on its mesh.
        objective: (outputs, batch) -> LossTerms.
        optimizer: makes the optimizer of the local parameters.
        schedule: update number (from 0) -> learning rate.
        clip: the largest global gradient norm; 0 does not clip.
        penalty: adds the gradients of L1 and L2 terms to the local gradients; None: none.
        precision: the dtype of the products and the fp16 loss scale.
        device: where this rank computes.
        rank: this rank's number in the world.
        loss_unit: fp16: what a loss sum is divided by before it is scaled, about the targets of a micro-batch, so that
            the loss scale is that of a mean; the same on every rank.
        ema: the decay of a moving average of the weights; 0 keeps none.
        """
        self.parallel = parallel
        self.parameters = LocalParameters(
            parallel.model, stages=parallel.mesh.group("pp"), copies=parallel.copies
        )
        self.optimizer = optimizer(self.parameters)
        self.updates = 0
        self.skips_in_a_row = 0
        self.unused: tuple[str, ...] | None = None
        self._loss_unit = loss_unit
        self._objective, self._schedule, self._clip, self._penalty = objective, schedule, clip, penalty
        self.device, self._rank = device, rank
        self.parts_are_shared = parallel.sharded
        self._dtype = DTYPES[precision.compute]
        self._sums = torch.float64 if self._dtype == torch.float64 else torch.float32
        self._scale = LossScale(precision) if precision.compute == "fp16" else None
        self._verdict: Verdict | None = None
        # Fused Adam takes `found_inf` and does nothing where it is set, without the host's knowing. Fused SGD leaves its
        # momentum undefined after a skipped first step, so there the host looks, and waits for the device.
        adam = isinstance(self.optimizer, torch.optim.Adam)  # AdamW is one
        self._skips_on_device = adam and bool(self.optimizer.defaults.get("fused")) and device.type == "cuda"
        self._pass_scale = 1.0
        for stage, watch in zip(parallel.pipeline.stages if parallel.pipeline else (), parallel.watches, strict=False):
            stage.slot.context = partial(self._surroundings, watch)
        self._make_optimizer_state()
        self._average = MovingAverage(self.parameters, decay=ema) if ema else None

    def train_step(self, microbatches: Sequence[Batch], *, samples: range, noise: bool = False) -> StepOut:
        """Take one optimizer step on this rank's micro-batches of one global batch.

        Args:
            microbatches: the accumulation's batches, on the CPU or the device; as many on every rank.
            samples: the numbers of all samples of the global batch, to name it should the step be skipped.
            noise: also estimate the gradient's noise; needs two micro-batches, with one there is no estimate.

        Returns:
            The global mean loss and gradient norm, still on the device.
        """
        for part in (*self.parallel.parts, self.parallel.forward):
            if not part.training:
                part.train()
        skipped = self.settle() if self._scale else ()  # the loss scale must know of an overflow before it is used
        scale = self._pass_scale = self._scale.value / self._loss_unit if self._scale else 1.0
        total, small = self._forward_backward(microbatches, scale=scale, noise=noise)
        comm.sum_over(total, self.parallel.mesh.loss_group)
        loss, count = (total[0] / total[1]).to(self._sums), total[1].to(self._sums)
        self.parameters.refresh()
        if self.unused is None:
            self.unused = self._find_unused()
        norm = self.parameters.squared_norm().sqrt() / (count * scale)
        bad = torch.logical_not(torch.isfinite(norm) & torch.isfinite(loss))
        estimates = None
        if small is not None:
            estimates = noise_estimates(small, norm=norm, count=count, samples=len(samples), scale=scale)
        self._finish_gradients(norm, count * scale)
        skipped += self.settle()
        lr = self._schedule(self.updates)
        self._update(lr, bad)
        self._verdict = Verdict(bad=bad, loss=loss, samples=samples)
        self.parameters.clear_gradients()
        if not self._skips_on_device:
            skipped += self.settle()
        return StepOut(loss, norm, lr, skipped, estimates)

    def _forward_backward(
        self, microbatches: Sequence[Batch], *, scale: float, noise: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Leave the summed gradients of this rank's micro-batches; gives [loss sum, count] in fp64, and what `noise` measured."""
        batches = (self._own_part(batch.to(self.device)) for batch in microbatches)
        if self.parallel.pipeline is not None:
            total = self.parallel.pipeline.train(list(batches), self._objective, scale=scale)
            return total, None
        model = self.parallel.forward
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # where any count is exact
        small: torch.Tensor | None = None
        for index, batch in enumerate(batches):
            measure = noise and index == 0 and len(microbatches) > 1
            set_last_microbatch(model, index == len(microbatches) - 1, readable=measure)
            terms = self._terms(batch)
            (terms.sum * scale if self._scale else terms.sum).backward()
            total += torch.stack([terms.sum.detach().to(self._sums), terms.count.to(self._sums)])
            if measure:
                self.parameters.refresh()
                small = small_batches(self.parallel, self.parameters, count=terms.count)
        return total, small

    def _own_part(self, batch: Batch) -> Batch:
        """This rank's part of every sequence, where cp cuts them."""
        return cut_batch(batch, self.parallel.mesh, method=self.parallel.layout.axes.cp_method)

    @property
    def step(self) -> int:
        """Updates taken, the last one included whose verdict is not yet read: on a GPU it may still turn out skipped."""
        return self.updates + (self._verdict is not None)

    def settle(self) -> tuple[Skipped, ...]:
        """Read the verdict on the last step; after it `updates` is exact."""
        if self._verdict is None:
            return ()
        verdict, self._verdict = self._verdict, None
        bad, loss_is_finite = verdict.read()
        finite = not bad
        forgiven = self._scale.update(finite) if self._scale else False
        if finite:
            self.updates += 1
            self.skips_in_a_row = 0
            if self._average is not None:  # the weights are still those of that step, even where the verdict comes late
                self._average.update()
            return ()
        self.skips_in_a_row += 0 if forgiven else 1  # fp16: too large a scale is no sign of divergence
        what = "gradient" if loss_is_finite else "loss"
        return (Skipped(verdict.samples, f"the {what} is not finite"),)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> LossTerms:
        """The loss terms of one micro-batch of this rank, without gradients, in eval mode."""
        self._evaluating()
        here = self._own_part(batch.to(self.device))
        if self.parallel.pipeline is not None:
            return LossTerms(*self.parallel.pipeline.evaluate(here, self._objective))
        return self._terms(here)

    def _evaluating(self) -> None:
        for part in (*self.parallel.parts, self.parallel.forward):
            if part.training:
                part.eval()

    @contextlib.contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The model as text is written with it: eval mode, the training precision, no gradients, no compiling.

        A model that ranks share answers only when every rank calls it, and with the same inputs, which are whole: nothing
        is cut over cp, and logits are gathered over tp.
        """
        self._evaluating()
        pipeline = self.parallel.pipeline
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for part in self.parallel.parts:
                stack.enter_context(plain_attention(part))
                stack.enter_context(whole_logits(part))
            # Growing caches would make a compiled block compile again for every length.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if pipeline is not None:
                yield PipelinedModel(pipeline)
            else:
                with self._autocast():
                    yield self.parallel.model

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving averages in the weights' place, to evaluate, write or export with; afterwards the weights, to the bit.

        Without `ema`, and inside itself, it changes nothing. A collective call; inside it is no training and no saving.
        """
        assert self._verdict is None, "settle first, so that the last step is in the average"
        if self._average is None or self._average.exchanged:
            yield
            return
        self._at_shards()
        with self._average.in_place_of_weights():
            try:
                yield
            finally:
                self._at_shards()  # before the exchange: FSDP may hold gathered averages, or have moved its shards

    def restart_average(self) -> None:
        """Begin the moving average with the present weights, as after loading a checkpoint that has none."""
        if self._average is not None:
            self._at_shards()
            self._average.restart()

    def _terms(self, batch: Batch) -> LossTerms:
        (watch,) = self.parallel.watches
        with self._surroundings(watch, batch):
            outputs = self.parallel.forward(**batch.inputs)
        return self._objective(outputs, batch)

    @contextlib.contextmanager
    def _surroundings(self, watch: RouterWatch | None, batch: Batch) -> Iterator[None]:
        """What a forward pass runs in: autocast, and in training the losses of routers."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._autocast())
            if watch is not None and torch.is_grad_enabled():
                group = self.parallel.mesh.group("cp")
                stack.enter_context(watch.forward_pass(batch, scale=self._pass_scale, group=group))
            yield

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """FSDP gathers parameters in the compute dtype itself; elsewhere autocast casts them from fp32."""
        if self._dtype in (torch.float32, torch.float64) or self.parallel.sharded:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def _finish_gradients(self, norm: torch.Tensor, divisor: torch.Tensor) -> None:
        """The one division by the global count, with the clip factor, then the penalties."""
        factor = 1.0 / divisor
        if self._clip > 0:
            factor = factor * torch.clamp(self._clip / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(self.parameters.gradients(), factor)
        if self._penalty is not None:
            self._penalty(self.parameters)

    def _update(self, lr: float, bad: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self._skips_on_device:
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(bad):
            self.optimizer.step()

    def _make_optimizer_state(self) -> None:
        """Make the optimizer's state at once: a run that does not fit fails now, and every checkpoint has the same names.

        A step of zero gradients at rate zero makes the state and moves no weight. What it left there is taken back: its count,
        and what an optimizer that takes decay for a gradient (adam, sgd, rmsprop) made of the first weights.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for local in self.parameters.local.values():
            local.grad = torch.zeros_like(local)
        self.optimizer.step()
        self.parameters.clear_gradients()
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def _find_unused(self) -> tuple[str, ...]:
        """The parameters that the first step left without a gradient, of all stages; DDP cannot have any."""
        own = [name for name, p in self.parameters.whole.items() if p.grad is None]
        unused = tuple(name for names in comm.gather_over(own, self.parallel.mesh.group("pp")) for name in names)
        if unused and isinstance(self.parallel.forward, DistributedDataParallel):
            shown = ", ".join(unused[:3])
            raise ConfigError(
                [f"model: {shown} got no gradient, and layout.dp_replicate needs one for each; nearest: layout.dp_shard"]
            )
        return unused

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Chunk]:
        """The checkpoint state of this rank: parameters, persistent buffers and optimizer state, by name."""
        assert self._verdict is None, "settle first, so that a skip is told"
        assert self._average is None or not self._average.exchanged, "saving inside `averaged`"
        self._at_shards()
        chunks: dict[str, Chunk] = {}
        for name, tensor in self._kept_tensors():
            chunks |= self._chunks(f"model.{name}", tensor, tensor, name)
        for name, local in self.parameters.local.items():
            for key, value in self.optimizer.state[local].items() if local in self.optimizer.state else ():
                if isinstance(value, torch.Tensor):
                    like = self.parameters.whole[name] if value.shape == local.shape else value
                    chunks |= self._chunks(f"optim.{name}.{key}", value, like, name)
        for name, value in self._average.values.items() if self._average is not None else ():
            chunks |= self._chunks(f"ema.{name}", value, self.parameters.whole[name], name)
        return chunks

    def facts(self) -> dict[str, Any]:
        """The engine's scalars, JSON: what `restore` needs besides the tensors."""
        assert self._verdict is None, "settle first, so that a skip is told"
        facts: dict[str, Any] = {"updates": self.updates, "skips_in_a_row": self.skips_in_a_row}
        return facts | ({"loss_scale": self._scale.state()} if self._scale else {})

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over the scalars of a checkpoint; its tensors are loaded into what `state` gives."""
        self.updates, self.skips_in_a_row = facts["updates"], facts["skips_in_a_row"]
        if self._scale and "loss_scale" in facts:
            self._scale.restore(facts["loss_scale"])

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and persistent buffer by name, whole, on the CPU of rank 0, one at a time."""
        self._reshard()
        named = {name: tensor for name, tensor in self._kept_tensors() if name not in self.parallel.copies}
        group = self.parallel.mesh.group("pp")
        for name, owner in owners_in_order(named, group):
            whole = self._whole(name, named[name]) if name in named else None
            if group is not None:
                whole = send_to_first(whole, owner=owner, group=group, device=self.device)
            yield name, whole.cpu() if self._rank == 0 and whole is not None else torch.empty(0)

    def _kept_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's parameters and persistent buffers by name."""
        model = self.parallel.model
        yield from model.named_parameters()
        persistent = model.state_dict(keep_vars=True).keys()
        yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)

    def _whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A whole tensor in the model's own order; a collective call of the ranks that share it."""
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            with quiet_redistribution():
                whole = whole.full_tensor()
        packing = self.parallel.packings.get(name)
        return whole if packing is None else packing.unpacked(whole)

    def _at_shards(self) -> None:
        """Let the local parameters be the shards that the model now computes with."""
        self._reshard()
        self.parameters.refresh()

    def _reshard(self) -> None:
        """Put the sharded parameters back in place: after an evaluation FSDP leaves what is outside the blocks gathered."""
        for module in (module for part in self.parallel.parts for module in part.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()
        assert not self.parallel.sharded or all(isinstance(p, DTensor) for p in self.parallel.model.parameters())

    def _chunks(self, key: str, value: torch.Tensor, like: torch.Tensor, name: str) -> dict[str, Chunk]:
        """This rank's pieces of one tensor of the checkpoint, laid out like `like`."""
        chunk = chunk_of(local_part(value), like=like, write=self.parallel.writes(name, like))
        packing = self.parallel.packings.get(name)
        if packing is None or not chunk.shape:
            return {key: chunk}
        pieces: dict[str, Chunk] = {}
        dim = packing.dim
        boxes = packing.boxes(chunk.offset[dim], chunk.data.shape[dim], whole=chunk.shape[dim])
        for number, (inside, at, length) in enumerate(boxes):
            offset = (*chunk.offset[:dim], at, *chunk.offset[dim + 1 :])
            pieces[f"{key}#{number}"] = replace(chunk, data=chunk.data.narrow(dim, inside, length), offset=offset)
        return pieces or {f"{key}#0": chunk}
