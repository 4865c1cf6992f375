"""A small causal model with everything that layouts get wrong: tied weights, odd sizes, a bias, a buffer, dropout off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch._dynamo  # an optimizer imports it at its first step: once here, not in every forked rank (1 s)
from torch import nn

from distllm.comm import World
from distllm.config.schema import ActivationConfig, OptimConfig, PrecisionConfig, ScheduleConfig
from distllm.data.batch import IGNORE, Batch
from distllm.engine.native import DTYPES, NativeEngine
from distllm.models.spec import ModelSpec
from distllm.parallel.mesh import AXES, build_mesh
from distllm.parallel.parallelize import Layout, parallelize
from distllm.train.objectives import causal_lm
from distllm.train.optim import make_optimizer, make_penalty
from distllm.train.schedule import make_schedule

VOCAB, HIDDEN, BLOCKS, SEQ = 37, 10, 3, 9


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 3 * HIDDEN + 1)
        self.down = nn.Linear(3 * HIDDEN + 1, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        return x + self.down(torch.tanh(self.up(self.norm(mean))))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.register_buffer("scale", torch.ones(1))
        self.layers = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def toy_spec() -> ModelSpec:
    return ModelSpec(name="toy", build=Toy, init=lambda module: None, blocks=("layers",), embedding="embed", head="head")


def toy_tensors(seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(seed)
    model = Toy()
    with torch.no_grad():
        for name, p in model.named_parameters():
            yield name, p + 0.3 * torch.randn_like(p)
    yield "scale", torch.full((1,), 2.0)


def sample(i: int, *, masked: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Sample i: tokens, and labels of which a number that depends on i is masked."""
    rng = np.random.default_rng(1000 + i)
    tokens = rng.integers(0, VOCAB, SEQ + 1)
    labels = tokens[1:].copy()
    if masked:
        labels[: int(rng.integers(0, SEQ))] = IGNORE
    return tokens[:-1], labels


def toy_batch(ids: Sequence[int]) -> Batch:
    rows = [sample(i) for i in ids]
    inputs = torch.from_numpy(np.stack([r[0] for r in rows]))
    labels = torch.from_numpy(np.stack([r[1] for r in rows]))
    return Batch({"input_ids": inputs}, {"labels": labels}, tuple(ids))


def step_of(start: int, *, size: int, accumulation: int, dp_rank: int, dp_size: int) -> list[Batch]:
    """This rank's micro-batches of the global batch [start, start + size)."""
    micro = size // (accumulation * dp_size)
    return [
        toy_batch([start + (a * dp_size + dp_rank) * micro + j for j in range(micro)]) for a in range(accumulation)
    ]


@dataclass(frozen=True)
class Settings:
    """How to run the toy."""

    replicate: int = 1
    shard: int = 1
    stages: int = 1
    accumulation: int = 1
    reshard: bool = True
    optim: OptimConfig = OptimConfig(lr=1e-2, clip=0.5)
    precision: PrecisionConfig = PrecisionConfig()
    activation: ActivationConfig = ActivationConfig()
    compile: bool = False
    ema: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


def toy_engine(world: World, settings: Settings) -> NativeEngine:
    sizes = dict.fromkeys(AXES, 1) | {
        "dp_replicate": settings.replicate, "dp_shard": settings.shard, "pp": settings.stages,
    }  # fmt: skip
    mesh = build_mesh(world, sizes=sizes)
    with torch.device("meta"):
        model = Toy()
    parallel = parallelize(
        model, mesh, spec=toy_spec(), tensors=toy_tensors(), device=world.device,
        layout=Layout(DTYPES[settings.precision.compute], settings.reshard, settings.activation, settings.compile),
    )  # fmt: skip
    return NativeEngine(
        parallel, objective=causal_lm, optimizer=make_optimizer(settings.optim, model=model, device=world.device),
        schedule=make_schedule(ScheduleConfig(warmup=2), peak=settings.optim.lr, steps=20), clip=settings.optim.clip,
        penalty=make_penalty(settings.optim, model=model), precision=settings.precision, device=world.device,
        rank=world.rank, loss_unit=float(SEQ), ema=settings.ema,
    )  # fmt: skip


def run_toy(
    world: World, settings: Settings, *, steps: int = 3, size: int = 8, start: int = 0
) -> dict[str, Any]:
    """Train and return losses, norms, and the whole weights (on rank 0) as numpy arrays."""
    engine = toy_engine(world, settings)
    losses, norms = [], []
    for step in range(steps):
        first = start + step * size
        mesh = engine.parallel.mesh
        batches = step_of(
            first, size=size, accumulation=settings.accumulation, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size
        )
        out = engine.train_step(batches, samples=range(first, first + size))
        losses.append(float(out.loss))
        norms.append(float(out.grad_norm))
    weights = {name: tensor.numpy().copy() for name, tensor in engine.full_tensors()}
    return {"losses": losses, "norms": norms, "weights": weights, "updates": engine.updates}
