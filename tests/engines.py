"""An engine for any spec and objective, on any layout of data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from distllm.comm import World
from distllm.config.schema import OptimConfig, PrecisionConfig, ScheduleConfig
from distllm.data.batch import Batch
from distllm.engine.base import Objective
from distllm.engine.native import DTYPES, NativeEngine
from distllm.models.build import initial_tensors, meta_model
from distllm.models.spec import ModelSpec
from distllm.parallel.mesh import AXES, Mesh, build_mesh
from distllm.parallel.parallelize import Layout as How
from distllm.parallel.parallelize import parallelize
from distllm.train.optim import make_optimizer
from distllm.train.schedule import make_schedule

Layout = Literal["one", "ddp", "fsdp", "hsdp"]


def mesh_of(world: World, layout: Layout) -> Mesh:
    """All ranks replicas, all shards, or shards in pairs."""
    shard = {"one": 1, "ddp": 1, "fsdp": world.size, "hsdp": 2}[layout]
    sizes = dict.fromkeys(AXES, 1) | {"dp_replicate": world.size // shard, "dp_shard": shard}
    return build_mesh(world, sizes=sizes)


def engine_of(
    world: World, mesh: Mesh, spec: ModelSpec, objective: Objective, *, precision: PrecisionConfig | None = None
) -> NativeEngine:
    precision, optim = precision or PrecisionConfig(), OptimConfig(lr=1e-2, clip=0.5)
    model = meta_model(spec)
    parallel = parallelize(
        model, mesh, spec=spec, tensors=initial_tensors(spec, seed=3), device=world.device,
        layout=How(DTYPES[precision.compute]),
    )  # fmt: skip
    return NativeEngine(
        parallel, objective=objective, optimizer=make_optimizer(optim, model=model, device=world.device),
        schedule=make_schedule(ScheduleConfig(warmup=2), peak=optim.lr, steps=20), clip=optim.clip, penalty=None,
        precision=precision, device=world.device, rank=world.rank,
    )  # fmt: skip


def train(
    engine: NativeEngine, make: Callable[[Sequence[int]], Batch], *, size: int, step: int, accumulation: int, steps: int = 2
) -> dict[str, Any]:
    """Train on samples 0.. dealt as the loader deals them: a step of `step` rows takes `size` samples, -1 fills it up.

    Returns:
        losses, norms, and on rank 0 the whole weights as numpy arrays.
    """
    mesh = engine.parallel.mesh
    micro = step // (accumulation * mesh.dp_size)
    losses, norms = [], []
    for number in range(steps):
        first = number * size
        rows = [first + i if i < size else -1 for i in range(step)]
        starts = [(a * mesh.dp_size + mesh.dp_rank) * micro for a in range(accumulation)]
        out = engine.train_step([make(rows[s : s + micro]) for s in starts], samples=range(first, first + size))
        losses.append(float(out.loss))
        norms.append(float(out.grad_norm))
    weights = {name: tensor.numpy().copy() for name, tensor in engine.full_tensors()}
    return {"losses": losses, "norms": norms, "weights": weights}
