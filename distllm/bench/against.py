"""distllm beside loops that others have, in turns: the ratio of their CPU time is what counts.

Each side starts from equal weights, takes the same micro-batches, the same fused AdamW and the same clipping. Every turn has
processes of its own, as each would have in use: what one side leaves in a process (caches, freed memory, an allocator's
settings) does not help or hinder another. Time is process CPU time of all ranks, which other work on the machine hardly
enters. Sides take turns, each round in another order.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distllm.bench.asked import ACCELERATE, BARE, ON_OUR_HOST, OURS, kind_of
from distllm.bench.case import Case
from distllm.bench.measure import together
from distllm.bench.sides import Setting, bare, hf_trainer
from distllm.comm import Agreement, World
from distllm.config.check import resolve_layout
from distllm.config.schema import Config
from distllm.data.batch import Batch
from distllm.data.loader import step_batches
from distllm.parallel.mesh import AXES, build_mesh
from distllm.track.meter import Meter
from distllm.train.build_native import build_engine
from distllm.train.host import tune_host
from distllm.train.tasks import make_task
from distllm.train.tune import first_tensors

Side = Callable[[int], tuple[float, float]]
"""Take so many steps; gives CPU-seconds and seconds."""


def problem(config: Config) -> str | None:
    """Why other loops cannot train what this config trains; None where they can."""
    if config.task.kind != "causal_lm" or config.model.spec is not None:
        return "is for task.kind=causal_lm and a model of transformers"
    if config.optim.name != "adamw" or config.optim.implementation not in ("auto", "fused"):
        return "is for optim.name=adamw, fused"
    if config.precision.compute not in ("fp32", "bf16"):
        return f"is for precision.compute fp32 or bf16, not {config.precision.compute}"
    if config.train.ema or config.tune.train != "all" or config.optim.l1 or config.optim.l2 or config.activation.mode != "none":
        return "is for plain training: train.ema=0 tune.train=all optim.l1=0 optim.l2=0 activation.mode=none"
    return None


def plain_data_parallel(config: Config, ranks: int) -> Config:
    """The config with replicas and nothing else, which every side has, under the native engine."""
    layout = type(config.layout)(dp_replicate=ranks, dp_shard=1)
    train = config.train.model_copy(update={"compile": False})
    return config.model_copy(update={"layout": layout, "train": train, "engine": type(config.engine)()})


@dataclass(frozen=True)
class Turn:
    """What one rank measured in one turn of one side."""

    cpu_s: float
    """CPU-seconds of a step."""
    wall_s: float
    tokens: int
    """Of a step, of all ranks."""


def load_sides(sides: Sequence[str]) -> None:
    """Import what the sides need, once and not in each of their processes."""
    with _quiet():
        for side in sides:
            if kind_of(side) != BARE:
                import_module("distllm.bench.with_accelerate" if kind_of(side) == ACCELERATE else "transformers.trainer")


def take_turn(case: Case, world: World, *, side: str, steps: int) -> Turn:
    """Train with one side for some steps, after two that do not count.

    Args:
        case: with `plain_data_parallel`.
        world: this rank's facts.
        side: `distllm`, or one of `asked.SIDES`.
        steps: that count.
    """
    config = case.config
    tune_host(config, world, allocator=side == OURS or side.endswith(ON_OUR_HOST))
    resolved = resolve_layout(config, world.size)
    mesh = build_mesh(world, sizes={axis: getattr(resolved, axis) for axis in AXES})
    batches = step_batches(case.samples(resolved), start=0, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, prefetch=1, pin=False)
    data = next(batches)
    batches.close()
    micro = [batch.to(world.device) for batch in data.microbatches]
    with tempfile.TemporaryDirectory(prefix="distllm-bench-") as folder, _quiet():
        if side == OURS:
            run = _ours(case, world, micro, tokens=data.tokens)
        else:
            run = _make(kind_of(side), Setting(config, world, _same_model(case, world), micro, Path(folder)))
        run(2)
        together(world)
        cpu, wall = run(steps)
        together(world)
    return Turn(cpu / steps, wall / steps, data.tokens)


def orders(sides: Sequence[str], rounds: int) -> Iterator[Sequence[str]]:
    """For each round the order of the sides: each begins in turn, forwards and backwards."""
    for number in range(rounds):
        first = number % len(sides)
        turn = [*sides[first:], *sides[:first]]
        yield turn if number % 2 == 0 else turn[::-1]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what other packages print and warn of: it would stand between the rows."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _make(kind: str, setting: Setting) -> Side:
    if kind == BARE:
        return timed(bare(setting), setting.world)
    if kind == ACCELERATE:
        from distllm.bench.with_accelerate import accelerated

        return timed(accelerated(setting), setting.world)
    return hf_trainer(setting)


def timed(step: Callable[[], object], world: World) -> Side:
    """A side that is a function of one step."""

    def run(steps: int) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            step()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        return time.process_time() - cpu, time.perf_counter() - wall

    return run


def _same_model(case: Case, world: World) -> nn.Module:
    """The model as transformers builds it, with the weights that distllm starts from."""
    model = case.spec.build().to(world.device)
    weights = dict(first_tensors(case.plain, case.spec, seed=case.config.seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.train()


def _ours(case: Case, world: World, micro: Sequence[Batch], *, tokens: int) -> Side:
    """What distllm's loop does at every step that does not log."""
    mesh = build_mesh(world, sizes={axis: getattr(resolve_layout(case.config, world.size), axis) for axis in AXES})
    tensors = first_tensors(case.plain, case.spec, seed=case.config.seed)
    engine = build_engine(case.config, world, mesh=mesh, spec=case.spec, task=make_task(case.config), tensors=tensors)
    meter, agreement = Meter(flops_per_token=None, peak=None, devices=world.size), Agreement(world, flags=3)
    samples = range(len(micro) * case.config.train.micro_batch * world.size)

    def step() -> None:
        with meter.waiting():
            pass
        engine.train_step(micro, samples=samples)
        meter.step(tokens)
        agreement.exchange([False, False, False])

    return timed(step, world)


def summary(turns: Mapping[str, Sequence[Sequence[Turn]]]) -> dict[str, Any]:
    """Side -> its CPU-seconds and seconds a token (medians over the rounds), and the ratio of distllm's to them, round by round.

    Args:
        turns: side -> for each round what each rank measured.
    """
    tokens, found = turns[OURS][0][0].tokens, {}
    totals = {side: [sum(turn.cpu_s for turn in ranks) for ranks in rounds] for side, rounds in turns.items()}
    for side, values in totals.items():
        wall = [max(turn.wall_s for turn in ranks) for ranks in turns[side]]
        figures: dict[str, Any] = {
            "cpu_s_per_token": statistics.median(values) / tokens, "wall_s_per_token": statistics.median(wall) / tokens,
            "cpu_s": values, "wall_s": wall, "ratio": None,
        }  # fmt: skip
        if side != OURS:
            ratios = [own / other for own, other in zip(totals[OURS], values, strict=True)]
            figures["ratio"] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        found[side] = figures
    return found
