"""A pipeline schedule of the user's own: a line a rank, a cell a slot, in the form that torch writes and reads.

A cell is `stage kind micro-batch`, such as 0F3: F forward, B backward, or its halves I (gradients of the inputs) and W (of the
weights). An empty cell is idle, and `(0F1;3B0)OVERLAP_F_B` is both, one after the other.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from distllm.config.errors import ConfigError
from distllm.config.places import missing

Kind = Literal["F", "B", "I", "W"]
CELL = re.compile(r"(\d+)([FBIW])(\d+)")
OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")


class Work(NamedTuple):
    """One slot of a rank."""

    stage: int
    kind: Kind
    microbatch: int


Step = tuple[Work, ...]
"""What a rank computes before it sends anything: one piece of work, or two."""

Order = tuple[tuple[Step, ...], ...]
"""For each rank its steps, in order."""


def read_order(path: Path, *, pp: int, microbatches: int) -> Order:
    """Read a schedule and check that it can be run.

    Args:
        path: the file.
        pp: ranks; the file has a line for each.
        microbatches: of one step.

    Raises:
        ConfigError: no such file, a cell that says nothing, work that is missing, twice, or waits for ever.
    """
    key = f"layout.pp_csv={path}"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except FileNotFoundError:
        raise ConfigError([f"{missing('layout.pp_csv', path)}, or layout.pp_schedule=1f1b"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{key}: cannot be read ({error}); nearest: layout.pp_schedule=1f1b"]) from error
    if len(rows) != pp:
        raise ConfigError([f"{key}: has {len(rows)} lines, and layout.pp={pp} needs one a rank; nearest: layout.pp={len(rows)}"])
    order = tuple(tuple(_steps(row, key, number)) for number, row in enumerate(rows, start=1))
    if problems := [f"{key}: {problem}" for problem in _problems(order, microbatches)]:
        raise ConfigError(problems)
    return order


def owners_of(order: Order) -> tuple[int, ...]:
    """For each stage of a schedule the rank that computes it."""
    held = {work.stage: rank for rank, row in enumerate(order) for step in row for work in step}
    return tuple(held[stage] for stage in range(len(held)))


def waits_for(work: Work, *, last: int) -> tuple[tuple[int, str, int], ...]:
    """The work whose end this work waits for, as (stage, kind, micro-batch); kind G is the gradient of a stage's inputs.

    Args:
        work: of some stage.
        last: the number of the last stage.
    """
    stage, kind, number = work
    if kind == "F":
        return ((stage - 1, "F", number),) if stage else ()
    if kind == "W":
        return ((stage, "G", number),)
    return ((stage, "F", number),) if stage == last else ((stage + 1, "G", number), (stage, "F", number))


def gives(work: Work) -> tuple[int, str, int]:
    """What others wait for, as in `waits_for`."""
    return (work.stage, "G" if work.kind in ("B", "I") else work.kind, work.microbatch)


def _steps(row: list[str], key: str, line: int) -> Iterator[Step]:
    for text in row:
        cell = text.strip()
        both = OVERLAP.fullmatch(cell)
        step = [CELL.fullmatch(part.strip()) for part in (both[1].split(";") if both else [cell] if cell else [])]
        if None in step:
            raise ConfigError([f"{key}: line {line}: {cell!r} is no work; nearest: 0F0, 0B0, 0I0, 0W0 or nothing"])
        if step:
            yield tuple(Work(int(match[1]), match[2], int(match[3])) for match in step)  # type: ignore[index, arg-type]


def _problems(order: Order, microbatches: int) -> Iterator[str]:
    """What keeps a schedule from being run."""
    held: dict[int, int] = {}
    kinds: dict[tuple[int, int], str] = {}
    for rank, row in enumerate(order):
        for stage, kind, number in chain.from_iterable(row):
            if held.setdefault(stage, rank) != rank:
                yield f"stage {stage} is on line {held[stage] + 1} and on line {rank + 1}"
                return
            if kind == "F" and number and "F" not in kinds.get((stage, number - 1), ""):
                yield f"{stage}F{number} comes before {stage}F{number - 1}: each stage takes micro-batches in order"
            kinds[stage, number] = kinds.get((stage, number), "") + kind
    if sorted(held) != list(range(len(held))):
        yield f"has the stages {sorted(held)}; nearest: 0 to {len(held) - 1}"
        return
    if other := sorted({number for _, number in kinds} - set(range(microbatches))):
        yield f"has micro-batch {other[0]}, and train.accumulation={microbatches}; nearest: train.accumulation={other[-1] + 1}"
    for stage in range(len(held)):
        for number in range(microbatches):
            if (found := kinds.get((stage, number), "")) not in ("FB", "FIW"):
                yield f"stage {stage} has {found or 'nothing'} for micro-batch {number}; nearest: F and then B, or F, I and W"
                return
    if stuck := _stuck(order):
        yield f"{stuck.stage}{stuck.kind}{stuck.microbatch} waits for what comes after it"


def _stuck(order: Order) -> Work | None:
    """The first work that nothing ever lets begin."""
    rows = [list(chain.from_iterable(row)) for row in order]
    last = max(work.stage for row in rows for work in row)
    done: set[tuple[int, str, int]] = set()
    at, moved = [0] * len(rows), True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while at[rank] < len(row) and all(need in done for need in waits_for(row[at[rank]], last=last)):
                done.add(gives(row[at[rank]]))
                at[rank] += 1
                moved = True
    return next((row[place] for row, place in zip(rows, at, strict=True) if place < len(row)), None)
