"""One rank of one cell: a few steps of the engine that a training run has, timed."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config
import torch.distributed as dist

from distllm import comm
from distllm.bench.case import Case
from distllm.comm import World
from distllm.config.check import resolve_layout
from distllm.config.errors import EXIT_MEMORY, DistllmError
from distllm.data.loader import Step, step_batches
from distllm.engine.base import Engine
from distllm.engine.deepspeed_start import load
from distllm.engine.native import DTYPES
from distllm.faults import describe, one_line
from distllm.parallel.mesh import AXES, Mesh, build_mesh
from distllm.track.meter import peak_memory
from distllm.track.peaks import peak_flops
from distllm.train.build import make_engine, refuse_too_large
from distllm.train.build_deepspeed import require_deepspeed
from distllm.train.host import seed_rank, tune_host
from distllm.train.tasks import make_task
from distllm.train.tune import first_tensors
from distllm.verify.collectives import Recorder

NO_MEMORY = "out of memory"


class OutOfMemory(DistllmError):
    """A cell that needs more memory than there is."""

    exit_code = EXIT_MEMORY


@dataclass(frozen=True)
class RankFigures:
    """What one rank measured."""

    device: str
    """The name of its device."""
    threads: int
    step_s: tuple[float, ...]
    """Seconds of each timed step, waiting for its data included."""
    wait_s: tuple[float, ...]
    """Of these, waiting for data."""
    cpu_s: float
    """CPU-seconds of this process over all timed steps."""
    tokens: tuple[int, ...]
    """Input tokens of each timed step, of all ranks, without padding."""
    memory: int
    """CUDA: the most bytes of tensors at once. CPU: the most resident bytes, less those before the model was built."""
    matrix_rate: float
    """FLOP/s of a matrix product in the format of the model, all ranks at once."""
    sheet_peak: float | None
    """FLOP/s by the data sheet; None for a CPU or a device that the table does not have."""
    sent: Mapping[str, tuple[int, int]] | None
    """`group kind` -> (collectives, bytes that this rank sent) in one step; None where blocks are compiled."""
    loss: float
    """Of the last step: a number that is not finite says that nothing was trained."""


def measure(case: Case, world: World, *, steps: int, warmup: int) -> RankFigures:
    """Build the engine of a case and take steps.

    Args:
        case: what to train.
        world: this rank's facts.
        steps: timed steps.
        warmup: steps before them.

    Raises:
        OutOfMemory: the model or its step is too large.
        ConfigError: the layout does not fit the model, or DeepSpeed is not installed. A collective call.
    """
    try:
        if case.config.engine.name == "deepspeed":
            require_deepspeed()
        tune_host(case.config, world)
        figures = _trained(case, world, steps=steps, warmup=warmup)
        gc.collect()  # the model is gone when the products take their memory
        rate = matrix_rate(world.device, DTYPES[case.config.precision.compute], world)
        return replace(figures, matrix_rate=rate)
    except Exception as error:
        if describe(error)[1] == EXIT_MEMORY and not isinstance(error, DistllmError):
            raise OutOfMemory(f"{NO_MEMORY}: {one_line(str(error)) or type(error).__name__}") from error
        raise


def _trained(case: Case, world: World, *, steps: int, warmup: int) -> RankFigures:
    """All figures but the rate of matrix products, which would leave its mark on the memory of a small model."""
    config, device = case.config, world.device
    torch._inductor.config.compile_threads = 1  # this process is forked and may have no pool
    if config.engine.name == "deepspeed":
        load(world)  # its code is no memory of the model's
    base = resident()
    resolved = resolve_layout(config, world.size)
    refuse_too_large(config, case.spec, world, shards=resolved.shards)
    mesh = build_mesh(world, sizes={axis: getattr(resolved, axis) for axis in AXES})
    engine = make_engine(
        config, world, mesh=mesh, spec=case.spec, task=make_task(config),
        tensors=partial(first_tensors, case.plain, case.spec, seed=config.seed),
    )  # fmt: skip
    seed_rank(config.seed, dp_rank=mesh.dp_rank, step=0)
    samples = case.samples(resolved)
    batches = step_batches(
        samples, start=0, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, prefetch=config.data.prefetch, pin=device.type == "cuda"
    )
    with contextlib.closing(batches):
        for _ in range(warmup):
            _step(engine, next(batches))
        engine.settle()
        step_s, wait_s, tokens, cpu_s, loss = _timed(engine, batches, world, steps=steps)
        memory = peak_memory(device) if device.type == "cuda" else max(0, peak_memory(device) - base)
        sent = None if config.train.compile else _sent(engine, batches, mesh)
    return RankFigures(
        _name(device), torch.get_num_threads(), step_s, wait_s, cpu_s, tokens, memory, 0.0, _sheet_peak(case, device), sent,
        float(loss),
    )  # fmt: skip


def _step(engine: Engine, data: Step) -> torch.Tensor:
    return engine.train_step(data.microbatches, samples=data.samples).loss


def _timed(
    engine: Engine, batches: Generator[Step], world: World, *, steps: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...], float, torch.Tensor]:
    """(seconds of each step, of waiting for data, tokens, CPU-seconds of all, the last loss).

    On a GPU the device's own clock is read, at the end only: a host that waits at every step would be measured with it.
    """
    cuda = world.device.type == "cuda"
    marks: list[float] = []
    events: list[torch.cuda.Event] = []
    waits, tokens, loss = [], [], torch.zeros(())

    def mark() -> None:
        if cuda:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        else:
            marks.append(time.perf_counter())

    together(world)
    begin = time.process_time()
    mark()
    for _ in range(steps):
        before = time.perf_counter()
        data = next(batches)
        waits.append(time.perf_counter() - before)
        loss = _step(engine, data)
        tokens.append(data.tokens)
        mark()
    engine.settle()
    if cuda:
        torch.cuda.synchronize(world.device)
        seconds = [a.elapsed_time(b) / 1000.0 for a, b in itertools.pairwise(events)]
    else:
        seconds = [b - a for a, b in itertools.pairwise(marks)]
    return tuple(seconds), tuple(waits), tuple(tokens), time.process_time() - begin, loss


def _sent(engine: Engine, batches: Generator[Step], mesh: Mesh) -> dict[str, tuple[int, int]]:
    """What this rank sends in one more step, which is not timed: looking at every operation takes time."""
    data = next(batches)
    with Recorder(mesh) as recorder:
        _step(engine, data)
    engine.settle()
    return {f"{group} {kind}": (sent.calls, round(sent.bytes)) for (group, kind), sent in recorder.traffic.items()}


def matrix_rate(device: torch.device, dtype: torch.dtype, world: World, *, size: int | None = None) -> float:
    """FLOP/s of a product of square matrices, the best of a few while all ranks do the same.

    Args:
        device: where.
        dtype: of the matrices.
        world: its ranks begin together.
        size: rows and columns; None: as much as fills the device.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    size = size or (8192 if cuda else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    together(world)
    for number in range(6):
        before = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize(device)
        if number:  # the first one loads kernels
            best = min(best, time.perf_counter() - before)
    together(world)  # no rank leaves while another still multiplies
    return 2.0 * size**3 / best


def together(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        comm.sum_over(torch.zeros((), device=world.device), dist.group.WORLD)
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _sheet_peak(case: Case, device: torch.device) -> float | None:
    if device.type != "cuda" or case.config.precision.compute == "fp64":
        return None
    fp32 = "tf32" if case.config.precision.tf32 else "fp32"
    dtype = fp32 if case.config.precision.compute == "fp32" else case.config.precision.compute
    return peak_flops(_name(device), dtype)
