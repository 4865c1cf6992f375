"""From what the ranks found to a verdict: the worst error of each quantity against its bound.

The error of a tensor is max |own - reference| / max |reference|. A tensor that is tiny beside the model's largest is
divided by FLOOR times the largest instead: a key bias, say, has a gradient that is zero in exact arithmetic, and its rounding
says nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from distllm.config.schema import Config
from distllm.verify.collectives import Traffic
from distllm.verify.trial import Arrays, Case, Pieces, RankReport, Trace

FLOOR = 1e-3
NO_DIRECTION = 1e-10
"""A gradient below this share of the model's largest is rounding: an optimizer that divides by its size makes noise of it."""
QUANTITIES = ("loss", "gradient", "norm", "clip", "start", "weight")


@dataclass(frozen=True)
class Bounds:
    """The largest relative error of each quantity that passes; None is not judged."""

    loss: float
    gradient: float
    norm: float
    clip: float | None
    start: float
    weight: float | None
    steps: int | None
    """Gradients, norms and clip factors of the first so many steps are judged; None: of all."""


BOUNDS: Mapping[str, Bounds] = {
    "fp64": Bounds(1e-12, 1e-12, 1e-12, 1e-12, 0.0, 1e-12, None),
    # After an update of Adam, which divides a gradient by its size, rounding of 1e-7 is 1e-5 in the weights: so the later
    # gradients are those of other weights, and weights are judged in fp64.
    "fp32": Bounds(2e-6, 2e-6, 2e-6, 2e-6, 0.0, None, 1),
    # 8 bits of mantissa; DDP's autocast and FSDP's cast parameters round at different places.
    "bf16": Bounds(2e-3, 3e-2, 5e-3, 5e-3, 0.0, None, 1),
}  # fmt: skip

DEEPSPEED_EPS = 1e-4
"""Adam's eps is at least this where engines are compared."""
# Adam's update changes with a gradient by at most lr / eps. Rounding moves the largest gradients, about 0.1 when they are
# clipped and divided, by 2e-8: with lr = 3e-3 and eps = 1e-4 that is 6e-7 of a step, 2e-6 of three, where the largest weights
# are about 0.1. An engine that takes another rate, by one percent only, is off by 1e-3.
DEEPSPEED_BOUNDS: Mapping[str, Bounds] = {
    "fp32": replace(BOUNDS["fp32"], clip=None, weight=2e-5),
    "bf16": replace(BOUNDS["bf16"], clip=None),
}
"""DeepSpeed keeps its weights in fp32, so it is not judged in fp64; the clip factor it shows in the gradient alone."""


def bounds_of(config: Config) -> Bounds:
    """What passes for the engine and the precision of a config."""
    precision = config.precision.compute
    if config.engine.name == "native":
        return BOUNDS[precision]
    bounds = DEEPSPEED_BOUNDS[precision]  # the sign of a gradient that is nothing but rounding is rounding too
    return replace(bounds, weight=None) if config.optim.name == "lion" else bounds


@dataclass(frozen=True)
class Verdict:
    """What is to say of one layout."""

    errors: Mapping[str, float]
    """Quantity -> worst error over steps, ranks and tensors."""
    worst: Mapping[str, str]
    """Quantity -> where that is: a tensor's name, or a step."""
    by_tensor: Mapping[str, float]
    """Name -> worst error of its gradient or weight, for the picture."""
    problems: tuple[str, ...]
    """What does not hold, a line each; empty: the layout is equal."""
    compared: int
    """Numbers compared, copies on several ranks included."""
    unjudged: tuple[str, ...] = ()
    """Weights without a direction: their gradient is rounding."""
    bounds: Bounds = BOUNDS["fp64"]
    """Against which it was judged."""


@dataclass
class _Worst:
    errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(QUANTITIES, 0.0))
    where: dict[str, str] = field(default_factory=dict)
    by_tensor: dict[str, float] = field(default_factory=dict)

    def see(self, quantity: str, error: float, where: str) -> None:
        if math.isnan(error):
            error = math.inf
        if error > self.errors[quantity] or quantity not in self.where:
            self.errors[quantity], self.where[quantity] = max(error, self.errors[quantity]), where


def judge(
    case: Case, reports: Sequence[RankReport], reference: Trace, *, expected: Callable[[RankReport], Traffic] | None = None
) -> Verdict:
    """Compare the ranks of one layout with one process.

    Args:
        case: of the layout.
        reports: of all its ranks.
        reference: what one process computed of the same samples.
        expected: what a rank should send at the last step; None: not judged.
    """
    bounds = bounds_of(case.config)
    worst = _Worst()
    problems = [*_missing_ranks(reports)]
    idle = _without_direction(reference) if _divides(case) else frozenset()
    for report in reports:
        _see_scalars(worst, report, reference, steps=bounds.steps)
        _see_tensors(worst, "start", report.starts, reference.starts, where="")
        for step, pieces in enumerate(report.gradients[: bounds.steps]):
            _see_tensors(worst, "gradient", pieces, reference.gradients[step], where=f" at step {step + 1}")
        judged = {name: piece for name, piece in report.weights.items() if name not in idle}
        _see_tensors(worst, "weight", judged, reference.weights, where="")
    for quantity in QUANTITIES:
        bound = getattr(bounds, quantity)
        if bound is not None and not worst.errors[quantity] <= bound:
            problems.append(f"{quantity}: {worst.errors[quantity]:.1e} is above {bound:.0e}, {worst.where[quantity]}")
    problems += _coverage("start", [r.starts for r in reports], reference.starts)
    for step, gradients in enumerate(reference.gradients):
        problems += _coverage(f"gradient at step {step + 1}", [r.gradients[step] for r in reports], gradients)
    problems += _coverage("weight", [r.weights for r in reports], reference.weights)
    problems += _sample_order(reports, reference)
    if expected is not None:
        problems += [line for report in reports for line in traffic_problems(report, expected(report))]
    compared = sum(p.numbers for r in reports for group in (r.starts, *r.gradients, r.weights) for p in group.values())
    told = tuple(dict.fromkeys(problems))
    return Verdict(worst.errors, worst.where, worst.by_tensor, told, compared, tuple(sorted(idle)), bounds)


def _see_scalars(worst: _Worst, report: RankReport, reference: Trace, *, steps: int | None) -> None:
    pairs = (
        ("loss", report.losses, reference.losses, None), ("norm", report.norms, reference.norms, steps),
        ("clip", report.factors, reference.factors, steps),
    )  # fmt: skip
    for quantity, own, whole, limit in pairs:
        if len(own) != len(whole):  # a step was not taken
            worst.see(quantity, math.inf, f"{len(own)} of {len(whole)} steps on rank {report.rank}")
        for step, (a, b) in enumerate(zip(own, whole, strict=False)):
            if a is not None and (limit is None or step < limit):
                worst.see(quantity, abs(a - b) / abs(b) if b else math.inf, f"step {step + 1} on rank {report.rank}")


def _see_tensors(worst: _Worst, quantity: str, pieces: Pieces, whole: Arrays, *, where: str) -> None:
    largest = max((_largest(array) for array in whole.values()), default=0.0)
    for name, piece in pieces.items():
        scale = max(_largest(whole[name]) if name in whole else 0.0, FLOOR * largest)
        error = piece.error / scale if scale else piece.error
        worst.see(quantity, error, f"{name}{where}")
        if quantity != "start":
            worst.by_tensor[name] = max(worst.by_tensor.get(name, 0.0), error)


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max()) if array.size else 0.0


def _divides(case: Case) -> bool:
    """Whether the optimizer takes only the sign of a gradient, as Lion does."""
    return case.config.optim.name == "lion"


def _without_direction(reference: Trace) -> frozenset[str]:
    """Parameters whose gradient is nothing but rounding at some step."""
    found: set[str] = set()
    for gradients in reference.gradients:
        largest = max((_largest(g) for g in gradients.values()), default=0.0)
        found |= {name for name, g in gradients.items() if _largest(g) < NO_DIRECTION * largest}
    return frozenset(found)


def _missing_ranks(reports: Sequence[RankReport]) -> Iterator[str]:
    for report in reports:
        if not report.weights or not any(report.gradients):
            yield f"rank {report.rank}: took no part: it holds no weights or no gradients"
        elif len(reports) > 1 and report.traffic is not None and not report.traffic:
            yield f"rank {report.rank}: took no part: it sent nothing at the last step"


def _coverage(what: str, pieces: Sequence[Pieces], whole: Arrays) -> list[str]:
    """Which tensors of the reference the ranks together do not hold whole."""
    held: dict[str, set[tuple[tuple[int, int], ...]]] = defaultdict(set)
    for found in pieces:
        for name, piece in found.items():
            held[name] |= set(piece.boxes)
    short = []
    for name, array in whole.items():
        numbers = sum(math.prod(stop - start for start, stop in box) for box in held.get(name, ()))
        if numbers < array.size:
            short.append(f"{name} ({numbers} of {array.size})")
    return [f"{what}: no rank holds all of {', '.join(short[:3])}"] if short else []


def _sample_order(reports: Sequence[RankReport], reference: Trace) -> list[str]:
    """Whether the ranks together read what one process reads: the same samples, each the same to the bit."""
    for step, wanted in enumerate(reference.rows):
        by_place: dict[tuple[int, ...], Mapping[int, str]] = {}
        for report in reports:
            place = tuple(report.place[axis] for axis in ("dp_replicate", "dp_shard", "ep"))
            if by_place.setdefault(place, report.rows[step]) != report.rows[step]:
                return [f"data: rank {report.rank} reads other samples at step {step + 1} than a rank it shares them with"]
        numbers = [number for rows in by_place.values() for number in rows]
        if len(numbers) != len(set(numbers)) or set(numbers) != set(wanted):
            own, others = sorted(numbers)[:6], sorted(wanted)[:6]
            return [f"data: at step {step + 1} the ranks read samples {own}..., one process {others}..."]
        if any(rows[number] != wanted[number] for rows in by_place.values() for number in rows):
            return [f"data: at step {step + 1} a sample holds other tokens than on one process"]
    return []


def traffic_problems(report: RankReport, expected: Traffic) -> Iterator[str]:
    """Where what a rank sent at its last step is not what the formula says."""
    sent = report.traffic or {}
    for key in sorted(sent.keys() | expected.keys()):
        own, wanted = sent.get(key), expected.get(key)
        if own != wanted:
            group, kind = key
            a = f"{own.calls} calls, {float(own.bytes):,.0f} bytes" if own else "nothing"
            b = f"{wanted.calls} calls, {float(wanted.bytes):,.0f} bytes" if wanted else "nothing"
            yield f"collectives: {kind} over {group}: {a}; the formula says {b} (rank {report.rank})"
