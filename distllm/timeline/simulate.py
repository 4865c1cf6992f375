"""When each rank of a pipeline computes what, and when it waits: one clock, given costs, messages that take no time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from distllm.config.schedule_csv import Kind, Order, Step, Work, gives, waits_for

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

    @property
    def length(self) -> float:
        """From the first forward to the last backward of the step."""
        return max(row[-1].end for row in self.ranks)

    @property
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
    sent: dict[tuple[int, str, int], float] = {}
    rows: list[list[Slot]] = [[] for _ in order]
    places = [0] * len(order)
    while any(place < len(row) for place, row in zip(places, order, strict=True)):
        before = sum(places)
        for rank, row in enumerate(order):
            while places[rank] < len(row):
                slots = _run(row[places[rank]], rows[rank], sent, last, costs)
                if slots is None:
                    break
                rows[rank] += slots
                sent |= {gives(slot.work): slots[-1].end for slot in slots}
                places[rank] += 1
        assert sum(places) > before, "the order was checked, or is one of ours"
    return Timeline(tuple(tuple(row) for row in rows))


def _run(
    step: Step, done: list[Slot], sent: Mapping[tuple[int, str, int], float], last: int, costs: Mapping[Kind, float]
) -> list[Slot] | None:
    """The slots of a rank's next step; None while something that it waits for is not known."""
    now, slots = done[-1].end if done else 0.0, []
    for work in step:
        for need in waits_for(work, last=last):
            if need not in sent:
                return None
            now = max(now, sent[need])
        slots.append(Slot(now, now + costs[work.kind], work))
        now = slots[-1].end
    return slots
