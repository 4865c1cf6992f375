"""The two estimates behind the gradient noise scale: what they are on every layout, and that they cost no bit of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distllm.comm import World
from distllm.config.schema import OptimConfig, PrecisionConfig, ScheduleConfig
from distllm.data.batch import Batch
from distllm.engine.base import LossTerms
from distllm.engine.native import NativeEngine
from distllm.models.spec import ModelSpec
from distllm.parallel.mesh import AXES, build_mesh
from distllm.parallel.parallelize import parallelize
from distllm.train.objectives import causal_lm
from distllm.train.optim import make_optimizer
from distllm.train.schedule import make_schedule
from tests.ranks import on_ranks
from tests.toy import Settings, step_of, toy_batch, toy_engine

ONE = World(0, 1, 0, 1, torch.device("cpu"))
DIM, ROWS, NOISE = 20, 4, 1.5  # of a row's gradient: E = weight - centre, and NOISE ** 2 variance in each of DIM numbers
LAYOUTS = [
    (1, {}), (2, {"replicate": 2}), (2, {"shard": 2}), (4, {"shard": 4}), (4, {"replicate": 2, "shard": 2}),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gradient(ids: Sequence[int]) -> tuple[np.ndarray, int]:
    """The summed gradient of the toy's first weights over some samples, flat, and the targets."""
    model = toy_engine(ONE, Settings()).parallel.model
    batch = toy_batch(ids)
    terms = causal_lm(model(**batch.inputs), batch)
    terms.sum.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy(), int(terms.count)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=str)
def test_the_estimates_are_those_of_the_formulas(ranks: int, layout: dict[str, int], tmp_path: Path) -> None:
    size, accumulation = 16, 2
    settings = Settings(accumulation=accumulation, **layout)

    def rank(world: World) -> list[float]:
        engine = toy_engine(world, settings)
        mesh = engine.parallel.mesh
        batches = step_of(0, size=size, accumulation=accumulation, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
        out = engine.train_step(batches, samples=range(size), noise=True)
        assert out.noise is not None
        return [float(value) for value in out.noise]

    # What is together in one small batch: the first micro-batches of the ranks of one shard group.
    replicas, shards = layout.get("replicate", 1), layout.get("shard", 1)
    micro = size // (accumulation * ranks)
    groups = [gradient(range(r * shards * micro, (r + 1) * shards * micro)) for r in range(replicas)]
    total, count = gradient(range(size))
    small_square = sum((g**2).sum() / c for g, c in groups) / sum(c for _, c in groups)
    small = sum(c for _, c in groups) / replicas * size / count
    large_square = ((total / count) ** 2).sum()
    wanted = [
        (size * large_square - small * small_square) / (size - small),
        (small_square - large_square) / (1 / small - 1 / size),
    ]
    for found in on_ranks(rank, ranks, tmp_path):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


class Centre(nn.Module):
    """Rows x give 0.5 |weight - x|^2, whose gradient is weight - x: its mean and its variance are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIM))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.weight - rows).square().sum(1)


def half_square(outputs: torch.Tensor, batch: Batch) -> LossTerms:
    """Each row counts for as many targets as its weight, 1 or 2, so that ranks have different counts."""
    weight = batch.targets["weight"]
    return LossTerms((outputs * weight).sum(), weight.sum())


def centre_engine(world: World, layout: dict[str, int]) -> NativeEngine:
    sizes = dict.fromkeys(AXES, 1) | {f"dp_{axis}": size for axis, size in layout.items()}
    with torch.device("meta"):
        model = Centre()
    spec = ModelSpec(name="centre", build=Centre, init=lambda module: None, blocks=(), embedding="weight", head="weight")
    start = [("weight", torch.full((DIM,), 0.5))]
    parallel = parallelize(model, build_mesh(world, sizes=sizes), spec=spec, tensors=start, device=world.device)
    optim = OptimConfig(name="sgd", lr=1e-30, momentum=0.0, clip=0.0)  # it stays where it is
    return NativeEngine(
        parallel, objective=half_square, optimizer=make_optimizer(optim, model=model, device=world.device),
        schedule=make_schedule(ScheduleConfig(), peak=1e-30, steps=10), clip=0.0, penalty=None,
        precision=PrecisionConfig(), device=world.device, rank=world.rank,
    )  # fmt: skip


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"replicate": 2}), (2, {"shard": 2})], ids=str)
def test_known_noise_is_found(ranks: int, layout: dict[str, int], tmp_path: Path) -> None:
    """True |G|^2 = DIM * 0.25 = 5 and tr = DIM * NOISE ** 2 = 45, so a noise scale of 9 samples."""
    accumulation, count = 4 // ranks, 150  # the same global batch of 16 rows on one rank and on two

    def rank(world: World) -> list[float]:
        engine = centre_engine(world, layout)
        mesh, found = engine.parallel.mesh, []
        for step in range(count):
            rng = np.random.default_rng(step)
            rows = torch.from_numpy(rng.normal(0.0, NOISE, (accumulation, ranks, ROWS, DIM)).astype(np.float32))
            batches = [
                Batch({"rows": rows[a, mesh.dp_rank]}, {"weight": torch.ones(ROWS)}, ()) for a in range(accumulation)
            ]
            found.append(engine.train_step(batches, samples=range(accumulation * ranks * ROWS), noise=True).noise)
        return torch.stack(found).mean(0).tolist()

    for squared_norm, variance in on_ranks(rank, ranks, tmp_path):
        assert squared_norm == pytest.approx(DIM * 0.25, rel=0.1)
        assert variance == pytest.approx(DIM * NOISE**2, rel=0.1)


def test_targets_become_samples_and_a_rank_without_targets_drops_out(tmp_path: Path) -> None:
    """Rows of two targets each count as one sample; the first micro-batch of rank 1 is padding."""

    def rank(world: World) -> list[float]:
        engine = centre_engine(world, {"replicate": 2})
        rows = [torch.arange(ROWS * DIM, dtype=torch.float32).reshape(ROWS, DIM).sin() * (a + 1) for a in range(2)]
        weights = [torch.full((ROWS,), 0.0 if (world.rank, a) == (1, 0) else 2.0) for a in range(2)]
        batches = [Batch({"rows": r}, {"weight": w}, ()) for r, w in zip(rows, weights, strict=True)]
        return engine.train_step(batches, samples=range(3 * ROWS), noise=True).noise.tolist()

    first, second = (np.sin(np.arange(ROWS * DIM, dtype=np.float64)).reshape(ROWS, DIM) * k for k in (1, 2))
    small = ((0.5 - first).mean(0) ** 2).sum()
    large = ((0.5 - (first + 2 * second) / 3).mean(0) ** 2).sum()
    wanted = [(3 * large - small) / 2, (small - large) / (1 / ROWS - 1 / (3 * ROWS))]
    for found in on_ranks(rank, 2, tmp_path):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize(("ranks", "layout"), [*LAYOUTS[:3], LAYOUTS[-1]], ids=str)
def test_measuring_changes_no_bit_of_the_run(ranks: int, layout: dict[str, int], tmp_path: Path) -> None:
    def rank(world: World) -> list[Any]:
        results = []
        for noise in (False, True):
            engine = toy_engine(world, Settings(accumulation=2, **layout))
            mesh, told = engine.parallel.mesh, []
            for step in range(3):
                batches = step_of(16 * step, size=16, accumulation=2, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
                out = engine.train_step(batches, samples=range(16 * step, 16 * step + 16), noise=noise)
                told.append((float(out.loss), float(out.grad_norm), out.noise is not None))
            results.append((told, {n: t.numpy().copy() for n, t in engine.full_tensors()}))
        return results

    (plain, weights), (measured, others) = on_ranks(rank, ranks, tmp_path)[0]
    assert [line[:2] for line in plain] == [line[:2] for line in measured]
    assert [line[2] for line in plain] == [False] * 3 and [line[2] for line in measured] == [True] * 3
    for name, value in weights.items():
        np.testing.assert_array_equal(others[name], value, err_msg=name)


def test_one_micro_batch_gives_no_estimate_and_a_loss_scale_does_not_matter() -> None:
    batches = step_of(0, size=16, accumulation=2, dp_rank=0, dp_size=1)
    assert toy_engine(ONE, Settings()).train_step(batches[:1], samples=range(8), noise=True).noise is None
    fp16 = Settings(precision=PrecisionConfig(compute="fp16", initial_loss_scale=256.0))
    wanted, found = (toy_engine(ONE, s).train_step(batches, samples=range(16), noise=True).noise for s in (Settings(), fp16))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0)
