"""What a pipeline schedule asks of the layout and the batch; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev", "csv")
SINGLE = ("gpipe", "1f1b")
"""One stage a rank."""
LOOPED = ("interleaved_1f1b", "interleaved_zero_bubble")
"""Rank r holds the stages r, r + pp, r + 2 pp, ..."""
V_SHAPED = ("zbv", "dualpipev")
"""Rank r holds the stages r and 2 pp - 1 - r."""
SPLITS_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev", "csv")
"""Gradients of inputs and of weights are computed at different times."""


def virtual_stages(schedule: str, virtual: int | Literal["auto"]) -> int:
    """Stages of one rank; what `layout.pp_virtual=auto` stands for."""
    return (1 if schedule in SINGLE else 2) if virtual == "auto" else virtual


def stage_owners(schedule: str, *, pp: int, virtual: int) -> tuple[int, ...]:
    """For each stage, in the order of the forward pass, the pp rank that holds it.

    Args:
        schedule: one of SCHEDULES but csv, whose file says it.
        pp: ranks.
        virtual: stages of one rank.
    """
    if schedule in V_SHAPED:
        return (*range(pp), *reversed(range(pp)))
    return tuple(stage % pp for stage in range(pp * virtual))


def needs_gathered(schedule: str) -> bool:
    """Whether FSDP must keep parameters gathered after a forward pass (layout.reshard_after_forward=false).

    Where the backward pass is split, torch 2.13 computes gradients of weights from graphs that hold gathered parameters
    which FSDP has freed: gradients are missing (interleaved zero bubble, ZBV) or wrong (DualPipeV), and nothing says so.
    """
    return schedule in SPLITS_BACKWARD


def schedule_problems(
    schedule: str, *, pp: int, virtual: int, microbatches: int, samples: int | None = None, compiled: bool = False
) -> Iterator[str]:
    """What a schedule cannot do, a line for each problem.

    Args:
        schedule: one of SCHEDULES.
        pp: ranks of the pipeline.
        virtual: stages of one rank.
        microbatches: of one step and data-parallel rank: train.accumulation.
        samples: of a micro-batch on all data-parallel ranks, where train.global_batch is set and has to change too.
        compiled: train.compile.
    """
    if pp == 1:
        return
    batch = "" if samples is None else " with train.global_batch={}"
    if compiled and schedule in SPLITS_BACKWARD:
        # torch 2.13: a second backward pass through a compiled graph, for the other half, may find its buffers given away.
        rule = f"a compiled block computes both halves of its backward pass at once, and {schedule} takes them apart"
        yield f"train.compile=true: {rule}; nearest: false, or layout.pp_schedule=interleaved_1f1b"
    if schedule in SINGLE and virtual != 1:
        yield f"layout.pp_virtual={virtual}: {schedule} has one stage a rank; nearest: 1, or layout.pp_schedule=interleaved_1f1b"
    if schedule in V_SHAPED and virtual != 2:
        yield f"layout.pp_virtual={virtual}: {schedule} has two stages a rank; nearest: 2"
    least = _least(schedule, pp, virtual)
    if microbatches < least:
        rule = f"{schedule} over layout.pp={pp} needs at least {least} micro-batches a step"
        near = f"{least}{batch.format(least * (samples or 1))}"
        yield f"train.accumulation={microbatches}: {rule}; nearest: {near}, or layout.pp_schedule=gpipe"
    elif schedule in LOOPED and microbatches % (rounds := max(1, microbatches // pp)):
        nearest = _nearest_looped(microbatches, pp)
        rule = f"{schedule} runs {rounds} rounds of {pp} or more, so it must be a multiple of {rounds}"
        yield f"train.accumulation={microbatches}: {rule}; nearest: {nearest}{batch.format(nearest * (samples or 1))}"


def _least(schedule: str, pp: int, virtual: int) -> int:
    """The fewest micro-batches that torch's schedule takes."""
    if schedule == "1f1b":
        return pp
    return 2 * pp if schedule == "dualpipev" else 1


def _nearest_looped(microbatches: int, pp: int) -> int:
    """The nearest number that torch's rounds divide: n with n % max(1, n // pp) == 0."""
    near = sorted(range(1, 2 * microbatches + pp), key=lambda n: (abs(n - microbatches), -n))
    return next(n for n in near if n % max(1, n // pp) == 0)
