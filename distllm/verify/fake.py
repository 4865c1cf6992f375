"""A layout too large for this machine: a few of its ranks, each alone in a fake world whose collectives move nothing.

What can be seen that way: that the mesh, the cuts and the schedule are built, the shape of every local piece, and what each
collective sends. Numbers cannot: what should come from another rank is whatever lies in the buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from distllm.comm import World
from distllm.config.check import resolve_layout
from distllm.data.loader import step_batches
from distllm.engine.local import local_part
from distllm.models.build import meta_model
from distllm.parallel import data as data_parallel
from distllm.parallel import parallelize as parallelizing
from distllm.verify.collectives import Recorder, Traffic
from distllm.verify.data import samples_of, thinned
from distllm.verify.judge import QUANTITIES, Verdict, bounds_of, traffic_problems
from distllm.verify.layouts import Layout
from distllm.verify.ledger import Step
from distllm.verify.local_shapes import own_shape
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
    zero = dict.fromkeys(QUANTITIES, 0.0)
    pieces = sum(one.pieces for one in seen)
    verdict = Verdict(zero, {}, {}, tuple(dict.fromkeys(problems)), pieces, bounds=bounds_of(case.config))
    return replace(row, verdict=verdict, traffic=[one.report.traffic or {} for one in seen], expected=expected)


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
    step = Step(case.config, case.spec, meta_model(case.spec), layout.sizes, mesh.coordinates(), ())
    wrong = [*_misshapen(places, step)]
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
    """What the fake world lacks: counts and objects come back as they were sent, and a bucket of DDP as it is."""
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
    def gathered(value: Any, group: Any) -> list[Any]:
        return [value] * (1 if group is None else dist.get_world_size(group))

    with (
        swapped(dist, "all_to_all_single", echo), swapped(data_parallel, "_add_bucket", add_bucket),
        swapped(parallelizing, "gather_over", gathered), _stages_without_a_vote(),
    ):  # fmt: skip
        yield


def _stages_without_a_vote() -> contextlib.AbstractContextManager[None]:
    """torch 2.13 lets stages vote on how they learn their shapes; ours are given them, which 2.11 takes as it is."""
    if not hasattr(schedules._PipelineSchedule, "_warmup_p2p"):
        return contextlib.nullcontext()
    from torch.distributed.pipelining.stage import InferenceMode

    def known(schedule: Any, stages: Sequence[Any], *args: Any, **options: Any) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    return swapped(schedules._PipelineSchedule, "_warmup_p2p", known)


def _misshapen(places: Mapping[str, torch.Tensor], step: Step) -> Iterator[str]:
    """Local pieces whose shape is not that of the whole cut by tp or ep, and then, in equal rows, by the shards."""
    whole = dict(step.model.named_parameters(remove_duplicate=False))
    for name, parameter in places.items():
        own, wanted = tuple(local_part(parameter).shape), own_shape(step, name, whole[name])
        if own != wanted:
            yield f"shape: {name} is {own} on {dict(step.place)}, arithmetic says {wanted}"
