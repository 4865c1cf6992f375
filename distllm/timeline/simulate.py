"""When each rank of a pipeline computes what, and when it waits: one clock, given costs, messages that take no time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from distllm.config.schedule_csv import Kind, Order, Step, Work

UNIT: Mapping[Kind, float] = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}
"""What a stage's work costs: the forward pass and both halves of the backward pass one slot each."""


class Slot(NamedTuple):
    """A piece of work in time."""

    begin: float
    end: float
    work: Work


@dataclass(frozen=True)
class Timeline:
    """One step of a pipeline."""

    ranks: tuple[tuple[Slot, ...], ...]
    """For each rank what it does, in order."""

    @cached_property
    def length(self) -> float:
        """From the first forward to the last backward of the step."""
        return max(row[-1].end for row in self.ranks)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """How long each rank computes."""
        return tuple(sum(slot.end - slot.begin for slot in row) for row in self.ranks)

    @property
    def idle(self) -> tuple[float, ...]:
        """How long each rank waits within the step: what the step's end, where all wait for the gradient norm, makes of it."""
        return tuple(self.length - busy for busy in self.busy)

    @property
    def idle_inside(self) -> tuple[float, ...]:
        """How long each rank waits between its own first and last work: all there is if steps follow without a common end."""
        return tuple(row[-1].end - row[0].begin - busy for row, busy in zip(self.ranks, self.busy, strict=True))

    @property
    def share(self) -> float:
        """The part of all ranks' time in the step that is idle."""
        return sum(self.idle) / (self.length * len(self.ranks))


def simulate(order: Order, *, costs: Mapping[Kind, float] = UNIT) -> Timeline:
    """Run an order: each piece of work begins when its rank is free and what it waits for has been sent.

    Args:
        order: for each rank its steps; one that can be run to its end.
        costs: time of each kind of work, in any one unit.
    """
    last = max(work.stage for row in order for step in row for work in step)
    # When a stage's output, or the gradient of its input, was sent, by (stage, micro-batch).
    outputs: dict[tuple[int, int], float] = {}
    gradients: dict[tuple[int, int], float] = {}
    rows: list[list[Slot]] = [[] for _ in order]
    waiting = [iter(row) for row in order]
    steps = [next(row, None) for row in waiting]
    while any(step is not None for step in steps):
        moved = False
        for rank, mine in enumerate(rows):
            step, now = steps[rank], mine[-1].end if mine else 0.0
            while step is not None and (slots := _run(step, now, outputs, gradients, last, costs)):
                now = slots[-1].end
                for _, _, (stage, kind, number) in slots:  # torch sends what a step gives when all of it is done
                    if kind == "F":
                        outputs[stage, number] = now
                    elif kind != "W":
                        gradients[stage, number] = now
                mine += slots
                step, moved = next(waiting[rank], None), True
            steps[rank] = step
        assert moved, "the order was checked, or is one of ours"
    return Timeline(tuple(map(tuple, rows)))


def _run(
    step: Step,
    now: float,
    outputs: Mapping[tuple[int, int], float],
    gradients: Mapping[tuple[int, int], float],
    last: int,
    costs: Mapping[Kind, float],
) -> list[Slot]:
    """The slots of a rank's next step; empty while something that it waits for is not known.

    What a stage needs of itself was before it in the order of its rank, so only its neighbours are looked at.
    """
    slots = []
    for work in step:
        stage, kind, number = work
        known: float | None = 0.0
        if kind == "F":
            known = outputs.get((stage - 1, number)) if stage else 0.0
        elif kind != "W" and stage != last:
            known = gradients.get((stage + 1, number))
        if known is None:
            return []
        begin = known if known > now else now
        now = begin + costs[kind]
        slots.append(Slot(begin, now, work))
    return slots
