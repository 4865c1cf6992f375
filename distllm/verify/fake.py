"""A layout too large for this machine: a few of its ranks, each alone in a fake world whose collectives move nothing.

What can be seen that way: that the mesh, the cuts and the schedule are built, the shape of every local piece, and what each
collective sends. Numbers cannot: what should come from another rank is whatever lies in the buffer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from distllm.comm import World
from distllm.config.check import resolve_layout
from distllm.data.loader import step_batches
from distllm.models.build import meta_model
from distllm.parallel import data as data_parallel
from distllm.parallel.parallelize import Parallel
from distllm.verify.collectives import Recorder, Traffic
from distllm.verify.data import samples_of, thinned
from distllm.verify.judge import QUANTITIES, Verdict, traffic_problems
from distllm.verify.layouts import Layout
from distllm.verify.precise import InFp64
from distllm.verify.ranks import Broken, on_ranks
from distllm.verify.rows import Row
from distllm.verify.swap import swapped
from distllm.verify.trial import Case, RankReport, built, routes, shapes_of

MOST = 6
"""Ranks that are looked at."""
STEPS = 3
"""DDP arranges its buckets again at the second."""


@dataclass(frozen=True)
class Seen:
    """What one rank of a fake world showed."""

    report: RankReport
    """Without numbers: traffic and coordinates."""
    misshapen: Sequence[str]
    """Local pieces whose shape is not what arithmetic says."""
    pieces: int


def look(
    case: Case, row: Row, *, timeout_s: float, formula: Callable[[RankReport], Traffic] | None
) -> Row:
    """Run some ranks of a layout in a fake world, and compare shapes and traffic with arithmetic."""
    layout = row.layout
    chosen = representatives(layout)
    seen = on_ranks(lambda world: _look(case, world, layout), layout.ranks, timeout_s=timeout_s, fake=chosen)
    if isinstance(seen, Broken):
        return replace(row, refused=seen.problems, broken=seen.reason)
    problems = [line for one in seen for line in one.misshapen]
    expected = [formula(one.report) for one in seen] if formula is not None else []
    for one, wanted in zip(seen, expected, strict=formula is not None):
        problems += traffic_problems(one.report, wanted)
    verdict = Verdict(dict.fromkeys(QUANTITIES, 0.0), {}, {}, tuple(dict.fromkeys(problems)), sum(one.pieces for one in seen))
    return replace(row, verdict=verdict, traffic=[one.report.traffic for one in seen], expected=expected)


def representatives(layout: Layout) -> tuple[int, ...]:
    """The first and last rank, and the first of some pipeline stages: all others are as one of them, elsewhere."""
    per_stage = layout.ranks // layout.sizes["pp"]
    stages = [0, 1, layout.sizes["pp"] // 2, layout.sizes["pp"] - 1]
    ranks = {0, per_stage - 1, layout.ranks - 1, *(stage * per_stage for stage in stages if stage < layout.sizes["pp"])}
    return tuple(sorted(ranks)[: MOST - 1]) + ((layout.ranks - 1,) if len(ranks) >= MOST else ())


def _look(case: Case, world: World, layout: Layout) -> Seen:
    """Build one rank, check its pieces, and take its steps."""
    with _answering():
        return _steps(case, world, layout)


def _steps(case: Case, world: World, layout: Layout) -> Seen:
    engine, mesh = built(case, world)
    places = dict(engine.parallel.model.named_parameters())
    whole = {n: tuple(p.shape) for n, p in meta_model(case.spec).named_parameters(remove_duplicate=False)}
    wrong = [*_misshapen(places, whole, engine.parallel, layout.sizes, mesh.coordinates())]
    resolved = resolve_layout(case.config, world.size)
    samples = samples_of(case.data, case.config, resolved=resolved, spec=case.spec)
    batches = step_batches(samples, start=0, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, prefetch=1, pin=False)
    recorder = Recorder(mesh)
    with contextlib.closing(batches), InFp64() if case.exact else contextlib.nullcontext():
        for number in range(STEPS):
            data = next(batches)
            micro = [thinned(batch, uneven=case.uneven, fold=case.fold) for batch in data.microbatches]
            with recorder if number == STEPS - 1 else contextlib.nullcontext(), routes(case.spec, engine) as routed:
                engine.train_step(micro, samples=data.samples)
            engine.settle()
    report = RankReport(
        world.rank, mesh.coordinates(), (), (), (), {}, (), {}, (), dict(recorder.traffic), shapes_of(micro, routed)
    )
    return Seen(report, wrong, len(places))


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """What the fake world lacks: an all-to-all of counts gives back what was sent, and a bucket of DDP comes back itself."""
    true = dist.all_to_all_single

    def echo(output: torch.Tensor, input: torch.Tensor, *args: Any, **options: Any) -> Any:
        done = true(output, input, *args, **options)
        if output.shape == input.shape and not output.is_floating_point():
            output.copy_(input)  # or its sizes would follow from whatever lies in the buffer
        return done

    def add_bucket(group: Any, bucket):  # type: ignore[no-untyped-def]  # DDP looks at these annotations
        dist.all_reduce(bucket.buffer(), group=group)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    add_bucket.__annotations__.clear()
    with swapped(dist, "all_to_all_single", echo), swapped(data_parallel, "_add_bucket", add_bucket):
        yield


def _misshapen(
    places: Mapping[str, torch.Tensor], whole: Mapping[str, tuple[int, ...]], parallel: Parallel, sizes: Mapping[str, int],
    place: Mapping[str, int],
) -> Iterator[str]:  # fmt: skip
    """Local pieces whose shape is not that of the whole cut by tp or ep, and then, padded to equal rows, by the shards."""
    ranks, index = 1, 0
    for axis in ("dp_shard", "ep", "cp"):
        ranks, index = ranks * sizes[axis], index * sizes[axis] + place[axis]
    for name, parameter in places.items():
        if not isinstance(parameter, DTensor):
            if tuple(parameter.shape) != whole[name]:
                yield f"shape: {name} is {tuple(parameter.shape)}, and the whole is {whole[name]} and not cut"
            continue
        axes = parameter.device_mesh.mesh_dim_names or ()
        shape, n, i = list(whole[name]), ranks, index
        for axis, placement in zip(axes, parameter.placements, strict=True):
            dim = getattr(placement, "dim", None)
            if axis in ("tp", "ep") and dim is not None:
                shape[dim] //= sizes[axis]
        if "ep" in axes and len(parallel.mesh.sizes):  # an expert: ep has spread it, the other shard axes cut it
            n, i = sizes["dp_shard"] * sizes["cp"], place["dp_shard"] * sizes["cp"] + place["cp"]
        if any(axis not in ("tp", "ep", "dp_replicate") and getattr(p, "dim", None) is not None for axis, p in zip(axes, parameter.placements, strict=True)):  # noqa: E501
            rows = math.ceil(shape[0] / n)
            shape[0] = max(0, min(shape[0], (i + 1) * rows) - i * rows)
        if list(parameter.to_local().shape) != shape:
            yield f"shape: {name} is {tuple(parameter.to_local().shape)} on {place}, arithmetic says {tuple(shape)}"
