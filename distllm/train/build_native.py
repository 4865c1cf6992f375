"""The native side of `build`: the model on its mesh with its first weights, and the engine that trains it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from distllm.comm import World
from distllm.config.check import resolve_layout
from distllm.config.check_task import loss_unit
from distllm.config.schema import Config
from distllm.engine.native import DTYPES, NativeEngine
from distllm.models.build import initial_tensors, meta_model
from distllm.models.spec import ModelSpec
from distllm.parallel.mesh import Mesh
from distllm.parallel.parallelize import Layout, Parallel, parallelize
from distllm.train.distill import Teacher, distilled
from distllm.train.optim import make_optimizer, make_penalty
from distllm.train.schedule import make_schedule
from distllm.train.tasks import Task
from distllm.train.tune import apply_tune, learning_rate_scales


def build_engine(
    config: Config,
    world: World,
    *,
    mesh: Mesh,
    spec: ModelSpec,
    task: Task,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    teacher: Teacher | None = None,
) -> NativeEngine:
    """The model on its mesh with its first weights, and the engine that trains it.

    Args:
        config: what decides how it learns.
        world: this rank's facts.
        mesh: the ranks by axis.
        spec: the model that trains, with adapters where they do.
        task: what it learns.
        tensors: the first weights by name, whole; None: those of `spec`.
        teacher: whom it learns from.
    """
    model = meta_model(spec)
    apply_tune(model, spec, config.tune)
    objective = task.objective
    if teacher is not None:
        objective = distilled(objective, teacher=teacher, config=config.distill, kind=task.kind)
    scales = learning_rate_scales(model, spec, config.tune)
    # By names of the whole model, before a pipeline cuts it.
    optimizer = make_optimizer(config.optim, model=model, device=world.device, scales=scales)
    penalty = make_penalty(config.optim, model=model)
    parallel: Parallel = parallelize(
        model, mesh, spec=spec, tensors=initial_tensors(spec, seed=config.seed) if tensors is None else tensors,
        device=world.device, layout=_layout_of(config, ranks=world.size),
    )  # fmt: skip
    return NativeEngine(
        parallel, objective=objective,
        optimizer=optimizer,
        schedule=make_schedule(config.schedule, peak=config.optim.lr, steps=config.train.steps),
        clip=config.optim.clip, penalty=penalty, precision=config.precision,
        device=world.device, rank=world.rank, ema=config.train.ema,
        loss_unit=loss_unit(config),
    )  # fmt: skip


def _layout_of(config: Config, *, ranks: int) -> Layout:
    """How the config lays the model out, besides the sizes of the axes."""
    return Layout(
        DTYPES[config.precision.compute], config.layout.reshard_after_forward, config.activation, config.train.compile,
        axes=config.layout, moe=config.moe, microbatches=resolve_layout(config, ranks).accumulation, seq_len=config.data.seq_len,
    )  # fmt: skip
