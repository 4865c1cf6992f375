"""The DeepSpeed engine: ZeRO 1, 2 and 3 under the step, the objective, the schedule and the checkpoints of the native one.

DeepSpeed means gradients over ranks; we want their sum over all targets, divided once. So each micro-batch's loss *sum*
goes backward, and what DeepSpeed then holds is the sum over micro-batches and ranks divided by the ranks. Its static loss
scale is by what it divides gradients and norm before it clips and updates; setting it to targets / ranks for that moment
makes the one division. The clip factor is then that of the true norm.

ZeRO keeps fp32 weights and optimizer state as flat pieces, of which each rank has one. A checkpoint gets them as boxes of
the tensors under their own names (flat.py), so that either engine reads what the other wrote. After a load the weights
that the model computes with are made from them anew.

What is used of DeepSpeed beyond its documented surface (0.19): the flat pieces and where they lie, and the two calls that
make weights of them. All of it is in `_Pieces`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distllm import comm
from distllm.checkpoint.chunk import Chunk
from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.data.batch import Batch
from distllm.engine.base import LossTerms, Objective, Skipped, StepOut
from distllm.engine.flat import flat_chunks
from distllm.engine.local import LocalParameters

Tensors = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""A call gives every parameter and buffer by name, whole, on the CPU."""


class DeepSpeedEngine:
    """Trains a model over which DeepSpeed's ZeRO is laid; all ranks read different samples.

    The host waits for every step: DeepSpeed reads the norm there. A step that is not finite on any rank leaves weights,
    optimizer state and schedule as they were. One engine a process: several in one
    were seen to hang.
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
        world: World,
    ) -> None:
        """Args:
        model: with its first weights in fp32, on the world's device.
        json: DeepSpeed's configuration.
        tensors: the first weights, from which the fp32 pieces are filled; the model's own are rounded by then.
        objective: (outputs, batch) -> LossTerms.
        optimizer: makes the optimizer of the parameters; it must treat each number by itself.
        schedule: update number (from 0) -> learning rate.
        world: this rank's facts; its process group has been started. All ranks read different samples.

        Raises:
            ConfigError: DeepSpeed does not do what it was told.
        """
        self.updates = 0
        self.skips_in_a_row = 0
        self.unused: tuple[str, ...] | None = ()  # DeepSpeed does not tell
        self.device, self._world = world.device, world
        self._objective, self._schedule = objective, schedule
        self._engine = _initialize(model, optimizer(LocalParameters(model)), json=json, world=world)
        self._pieces = _Pieces(self._engine, stage=json["zero_optimization"]["stage"], rank=world.rank)
        self._pieces.make_optimizer_state()
        self._loaded = False
        self.parts_are_shared = json["zero_optimization"]["stage"] == 3
        if json["bf16"]["enabled"]:
            self._pieces.fill(tensors())

    def train_step(self, microbatches: Sequence[Batch], *, samples: range, noise: bool = False) -> StepOut:
        """Take one optimizer step on this rank's micro-batches of one global batch; `noise` is not measured."""
        self._follow_pieces()
        self._engine.train()
        optimizer = self._engine.optimizer
        optimizer.loss_scale = 1.0
        total = torch.zeros(2, dtype=torch.float32, device=self.device)
        for index, batch in enumerate(microbatches):
            is_last = index == len(microbatches) - 1
            self._engine.set_gradient_accumulation_boundary(is_last)
            here = batch.to(self.device)
            terms = self._objective(self._engine(**here.inputs), here)
            total += torch.stack([terms.sum.detach().float(), terms.count.float()])
            loss = terms.sum
            if is_last:  # every rank's gradient shall tell what the global loss is, or ranks would part
                comm.sum_over(total, _everyone(self._world))
                loss = loss * torch.where(torch.isfinite(total[0] / total[1]), 1.0, torch.nan)
            self._engine.backward(loss, scale_wrt_gas=False)
        mean, count = total[0] / total[1], float(total[1])
        lr = self._schedule(self.updates)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.loss_scale = count / self._world.size if count > 0 else 1.0
        self._engine.step()
        norm = torch.as_tensor(torch.nan if optimizer.overflow else self._engine.get_global_grad_norm(), dtype=torch.float32)
        return StepOut(mean, norm.to(self.device), lr, self._count(mean, bad=bool(optimizer.overflow), samples=samples))

    def _count(self, loss: torch.Tensor, *, bad: bool, samples: range) -> tuple[Skipped, ...]:
        """Note whether the step was taken."""
        if not bad:
            self.updates += 1
            self.skips_in_a_row = 0
            return ()
        self.skips_in_a_row += 1
        what = "gradient" if bool(torch.isfinite(loss)) else "loss"
        return (Skipped(samples, f"the {what} is not finite"),)

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
        self._engine.eval()
        here = batch.to(self.device)
        return self._objective(self._engine.module(**here.inputs), here)

    @contextlib.contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The model as text is written with it; at stage 3 it answers only when every rank calls it."""
        self._follow_pieces()
        self._engine.eval()
        with torch.no_grad():
            yield self._engine.module

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
        for name, buffer in self._buffers():
            chunks[f"model.{name}"] = Chunk(buffer, tuple(buffer.shape), (0,) * buffer.dim(), self._world.is_main)
        return chunks

    def facts(self) -> dict[str, Any]:
        """The engine's scalars, JSON."""
        return {"updates": self.updates, "skips_in_a_row": self.skips_in_a_row}

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over the scalars of a checkpoint; its tensors are loaded into what `state` gives."""
        self.updates, self.skips_in_a_row = facts["updates"], facts["skips_in_a_row"]
        self._loaded = True

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and persistent buffer by name, whole, in fp32, on the CPU of rank 0, one at a time."""
        empty = torch.empty(0)
        for name in self._pieces.names:
            whole = self._pieces.whole(name, world=self._world)
            yield name, whole.cpu() if self._world.is_main else empty
        for name, buffer in self._buffers():
            yield name, buffer.detach().cpu() if self._world.is_main else empty

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The persistent buffers by name."""
        for prefix, module in self._engine.module.named_modules():
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    yield name, buffer

    def _follow_pieces(self) -> None:
        """Make the weights from the fp32 pieces, where a checkpoint was loaded into these; a collective call."""
        if self._loaded:
            self._pieces.to_weights()
            self._loaded = False


@dataclass(frozen=True)
class _Piece:
    """This rank's numbers of one parameter: [at, at + length) of a flat piece, [start, start + length) of the parameter."""

    flat: torch.Tensor
    at: int
    start: int
    length: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This parameter's numbers in the flat piece, or in optimizer state as long as it; [length], shares its memory."""
        return flat.detach().narrow(0, self.at, self.length)


class _Pieces:
    """The fp32 weights and the optimizer state as ZeRO has cut them, by the names of parameters."""

    def __init__(self, engine: Any, *, stage: int, rank: int) -> None:
        self._zero, self._stage, self._rank = engine.optimizer, stage, rank
        self._pieces: dict[str, _Piece] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        find = self._cut_parameter if stage == 3 else self._whole_parameter
        for name, parameter in engine.module.named_parameters():
            assert parameter.requires_grad, f"{name} is frozen, which check_engine refuses"
            self._shapes[name] = tuple(parameter.ds_shape if stage == 3 else parameter.shape)
            self._pieces[name] = find(parameter)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters."""
        return tuple(self._pieces)

    def _whole_parameter(self, parameter: nn.Parameter) -> _Piece:
        """Stages 1 and 2: a group of parameters is one row, and each rank has an equal part of it."""
        group = next(i for i, members in enumerate(self._zero.bit16_groups) if any(p is parameter for p in members))
        flat, place = self._zero.single_partition_of_fp32_groups[group], parameter._hp_mapping  # type: ignore[attr-defined]
        if place is None:  # it lies on other ranks
            return _Piece(flat, 0, 0, 0)
        return _Piece(flat, place.hp_fragment_address.start, place.lp_fragment_address.start, place.lp_fragment_address.numel)

    def _cut_parameter(self, parameter: Any) -> _Piece:
        """Stage 3: each parameter is cut into equal parts, the last ones padded."""
        group, at, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        part = parameter.ds_tensor.ds_numel
        start = min(self._rank * part, parameter.ds_numel)
        return _Piece(self._zero.fp32_partitioned_groups_flat[group], at, start, min(part, parameter.ds_numel - start))

    def _flats(self) -> list[torch.Tensor]:
        cut = self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        return list(cut)

    def make_optimizer_state(self) -> None:
        """Make the optimizer's state at once, as the native engine does: the checkpoints of both have the same names.

        A step of zero gradients at rate zero makes the state and moves no weight; its count is taken back.
        """
        base, state = self._zero.optimizer, self._zero.optimizer.state
        kept, base.param_groups = base.param_groups, []
        for index, flat in enumerate(self._flats()):
            group = kept[self._zero.sub_group_to_group_id[index] if self._stage == 3 else index]
            base.param_groups.append({**group, "params": [flat], "lr": 0.0})
        before = [flat.grad for flat in self._flats()]  # with offloading DeepSpeed has buffers there
        for flat in self._flats():
            flat.grad = torch.zeros_like(flat)
        base.step()
        for flat, gradient in zip(self._flats(), before, strict=True):
            flat.grad = gradient
            if "step" in state[flat]:
                state[flat]["step"].zero_()
        base.param_groups = kept

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy this rank's numbers of whole tensors into the fp32 pieces."""
        for name, whole in tensors:
            if (piece := self._pieces.get(name)) is not None and piece.length:
                piece.of(piece.flat).copy_(whole.reshape(-1).narrow(0, piece.start, piece.length))

    def to_weights(self) -> None:
        """Make the weights that the model computes with from the fp32 pieces; a collective call."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._flats())):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if kept := self._zero.persistent_parameters:  # small ones stay gathered
            kept[0].all_gather(kept)

    def whole(self, name: str, *, world: World) -> torch.Tensor:
        """A whole parameter in fp32; a collective call."""
        piece, shape = self._pieces[name], self._shapes[name]
        numbers = torch.zeros(prod(shape), dtype=torch.float32, device=world.device)
        numbers.narrow(0, piece.start, piece.length).copy_(piece.of(piece.flat))
        return comm.sum_over(numbers, _everyone(world)).view(shape)

    def chunks(self) -> dict[str, Chunk]:
        """This rank's pieces of parameters and optimizer state."""
        chunks: dict[str, Chunk] = {}
        state = self._zero.optimizer.state
        for name, piece in self._pieces.items():
            shape = self._shapes[name]
            chunks |= flat_chunks(f"model.{name}", piece.of(piece.flat), shape=shape, start=piece.start)
            for key, value in state[piece.flat].items():
                if not isinstance(value, torch.Tensor):
                    continue
                at = f"optim.{name}.{key}"
                if value.shape == piece.flat.shape:
                    chunks |= flat_chunks(at, piece.of(value), shape=shape, start=piece.start)
                else:  # a step count, the same on all ranks
                    chunks[at] = Chunk(value, tuple(value.shape), (0,) * value.dim(), self._rank == 0)
        return chunks


def _everyone(world: World) -> dist.ProcessGroup | None:
    return dist.group.WORLD if world.size > 1 else None


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, *, json: Mapping[str, Any], world: World) -> Any:
    """`deepspeed.initialize`, quiet, without compiling anything, and with all that it was told in force."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it looks there, though it is given everything
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls names that torch has deprecated, at every collective.
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch)\..*")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for a minute, and not used in training
    if not dist.is_initialized():  # a world of one
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist.get_backend(), verbose=False, auto_mpi_discovery=False)
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(json))
    for module, name, buffer in buffers:  # bf16 rounds them too, and rotary frequencies do not bear it
        module._buffers[name] = buffer.to(world.device)
    _refuse_ignored(engine, json)
    return engine


def _refuse_ignored(engine: Any, json: Mapping[str, Any]) -> None:
    """Compare what DeepSpeed says of itself with what it was told: it drops what it does not understand without a word."""
    told = {
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "zero_optimization.stage": int(engine.zero_optimization_stage()),
        "bf16.enabled": engine.bfloat16_enabled(),
    }
    for key, value in told.items():
        wanted: Any = json
        for part in key.split("."):
            wanted = wanted[part]
        if wanted != value:
            raise ConfigError(
                [f"engine.name=deepspeed: DeepSpeed takes {key}={value}, and was told {wanted}; nearest: engine.name=native"]
            )
