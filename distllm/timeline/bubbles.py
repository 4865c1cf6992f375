"""How long each rank of a pipeline waits in a step, by formula."""

from __future__ import annotations

from collections.abc import Mapping

from distllm.config.schedule_csv import Kind
from distllm.timeline.simulate import UNIT


def bubble(schedule: str, *, pp: int, microbatches: int, costs: Mapping[Kind, float] = UNIT) -> float | None:
    """Idle time of each rank in a step, in the unit of `costs`, which are those of one stage.

    It is the same on every rank, and does not depend on the number of stages of a rank: interleaving makes stages shorter.

    | schedule | idle |
    |---|---|
    | gpipe, 1f1b, interleaved 1f1b | (p-1)(F+B) |
    | interleaved zero bubble, which is ZB-H1 with one stage a rank | (p-1)(F+B-2W) |
    | zbv | 0 within each rank's own first and last work; the ranks begin and end (p-1) F apart |
    | dualpipev | (p-1)(F&B+B-3W), where F&B is F+B: torch runs a pair one after the other |

    Args:
        schedule: one of SCHEDULES but csv.
        pp: p.
        microbatches: of the step.
        costs: of F, B, I and W, where B = I + W. The zero-bubble formulas are for F = I = W.

    Returns:
        The time; None where the formula does not hold, because there are too few micro-batches to fill the schedule.

    Sources: arXiv 1811.06965, 2104.04473, 2401.10241 and 2412.19437.
    """
    forward, backward, weights = costs["F"], costs["B"], costs["W"]
    if schedule == "gpipe" or (schedule in ("1f1b", "interleaved_1f1b") and microbatches >= pp):
        return (pp - 1) * (forward + backward)
    if schedule == "interleaved_zero_bubble" and microbatches >= pp:
        return (pp - 1) * (forward + backward - 2 * weights)
    if schedule == "zbv" and microbatches >= 2 * pp - 1:
        return (pp - 1) * forward
    if schedule == "dualpipev" and microbatches >= 2 * pp:
        return (pp - 1) * (forward + 2 * backward - 3 * weights)
    return None
