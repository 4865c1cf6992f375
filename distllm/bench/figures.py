"""Arithmetic: from what ranks measured to the figures of a cell, and from cells to scaling."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distllm.bench.measure import RankFigures


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, and how far they lie apart."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""
    error: float
    """The standard error of the median."""


def spread(values: Sequence[float]) -> Spread:
    """The spread of one measurement or more.

    The error is 1.2533 sigma / sqrt(n), with sigma = 1.4826 times the median distance from the median, so that a few steps
    that something else on the machine held up count for little.
    """
    median = statistics.median(values)
    if len(values) == 1:
        return Spread(median, median, median, 0.0)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    sigma = 1.4826 * statistics.median(abs(value - median) for value in values)
    return Spread(median, low, high, 1.2533 * sigma / math.sqrt(len(values)))


@dataclass(frozen=True)
class Figures:
    """What a cell came to."""

    step_s: tuple[float, ...]
    """Of the slowest rank, each timed step."""
    time: Spread
    tokens_per_s: float
    """Tokens of a step over its median time, all ranks together."""
    cpu_s_per_token: float
    """CPU-seconds of all ranks over all tokens."""
    wait_share: float
    """Of the step time, waiting for data; the rank that waits most."""
    memory: int
    """Bytes of the rank that takes most."""
    sent: int | None
    """Bytes of the rank that sends most, in one step."""
    collectives: Mapping[str, tuple[int, int]] | None
    """Its collectives: `group kind` -> (calls, bytes)."""
    peak: float
    """FLOP/s of all ranks together that MFU is a share of."""
    peak_name: str
    """Where it comes from."""
    matrix_rate: float
    """FLOP/s of a matrix product in the same run, all ranks together."""
    mfu: Mapping[str, float]
    """Convention -> share of the peak; empty where no formula holds."""
    hfu: float | None
    """With what is computed again (palm's convention); None where nobody knows how much that is."""
    devices: int
    """GPUs, or CPU threads."""
    device: str
    loss: float


def figures_of(ranks: Sequence[RankFigures], *, flops: Mapping[str, float], computed: float | None) -> Figures:
    """The figures of a cell.

    Args:
        ranks: what each measured.
        flops: convention -> model FLOPs of a token.
        computed: FLOPs that are computed over FLOPs of the model, if known.
    """
    steps = tuple(max(times) for times in zip(*(rank.step_s for rank in ranks), strict=True))
    tokens = ranks[0].tokens
    time = spread(steps)
    rate = statistics.mean(tokens) / time.median
    measured = sum(rank.matrix_rate for rank in ranks)
    sheet = [rank.sheet_peak for rank in ranks]
    known = [peak for peak in sheet if peak is not None]
    peak = sum(known) if len(known) == len(sheet) else measured
    name = f"data sheet of {ranks[0].device}" if len(known) == len(sheet) else "matrix products of the same run"
    mfu = {convention: rate * each / peak for convention, each in flops.items()}
    most = max(ranks, key=lambda rank: sum(size for _, size in (rank.sent or {}).values()))
    cuda = ranks[0].device != "CPU"
    return Figures(
        steps, time, rate, sum(rank.cpu_s for rank in ranks) / sum(tokens),
        max(sum(rank.wait_s) / sum(rank.step_s) for rank in ranks), max(rank.memory for rank in ranks),
        None if most.sent is None else sum(size for _, size in most.sent.values()), most.sent,
        peak, name, measured, mfu, mfu["palm"] * computed if mfu and computed is not None else None,
        len(ranks) if cuda else sum(rank.threads for rank in ranks), ranks[0].device, ranks[0].loss,
    )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """What scaling reads of a cell."""

    group: str
    """Cells with the same text differ in layout and batch alone."""
    devices: int
    global_batch: int
    tokens_per_s: float


@dataclass(frozen=True)
class Scaling:
    """How much of the speed of fewer devices is left on each."""

    kind: str
    """strong: the same global batch on more devices. weak: the global batch grows with them."""
    base: int
    """The number of the cell that it is compared with."""
    efficiency: float
    """Tokens a second and device, over those of the base: 1 is ideal."""


def scaling(points: Sequence[Point | None]) -> list[Scaling | None]:
    """For each cell its efficiency against the one with the fewest devices and the same work.

    Args:
        points: the cells; None for one without figures.

    Returns:
        As many; None where there is nothing to compare with. Of several bases the fastest counts.
    """
    return [None if point is None else _against_base(point, points) for point in points]


def _against_base(point: Point, points: Sequence[Point | None]) -> Scaling | None:
    for kind in ("strong", "weak"):
        peers = [(n, p) for n, p in enumerate(points) if p is not None and p.group == point.group and _same_work(p, point, kind)]
        fewest = min(p.devices for _, p in peers)
        if fewest < point.devices:
            number, base = max((item for item in peers if item[1].devices == fewest), key=lambda item: item[1].tokens_per_s)
            ideal = base.tokens_per_s * point.devices / base.devices
            return Scaling(kind, number, point.tokens_per_s / ideal)
    return None


def _same_work(a: Point, b: Point, kind: str) -> bool:
    if kind == "strong":
        return a.global_batch == b.global_batch
    return a.global_batch * b.devices == b.global_batch * a.devices


def as_json(figures: Figures) -> dict[str, Any]:
    """The figures as plain values."""
    told = dict(vars(figures))
    told["time"] = dict(vars(figures.time))
    told["step_s"] = list(figures.step_s)
    told["loss"] = figures.loss if math.isfinite(figures.loss) else None
    told["mfu"] = dict(figures.mfu)
    told["collectives"] = None if figures.collectives is None else {k: list(v) for k, v in figures.collectives.items()}
    return told
