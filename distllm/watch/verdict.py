"""From what the ranks say of themselves to who holds up the others, in one line. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distllm.watch.beat import FAILED, LEFT, RUNS, Beat

_PHASES = {
    "start": "while it started", "data": "while it waited for data", "forward": "in the forward pass",
    "backward": "in the backward pass", "update": "in the update of the weights", "evaluation": "in the evaluation",
    "sample": "while it wrote a text sample", "checkpoint": "while it saved a checkpoint", "end": "at the end of the run",
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A rank as another one sees it."""

    beat: Beat
    age_s: float
    """Seconds without a new beat."""
    end: str | None = None
    """How its process ended, where that can be known."""
    stopped: bool = False
    """Whether its process is stopped by a signal."""


@dataclass(frozen=True)
class Verdict:
    """The rank that holds up the others."""

    culprit: Seen
    what: str
    """What happened to it."""
    waiting: tuple[Beat, ...]
    """The ranks that still answer."""


def judge(seen: Sequence[Seen], *, lost_s: float, stall_s: float, patient: bool = True) -> Verdict | None:
    """The rank that died, does not answer, or stands still while others wait for it; None if all is well.

    Args:
        seen: all ranks that are known of. One that tells its own error, or has left, is never blamed.
        lost_s: seconds without a beat after which a rank is lost; one whose process has ended is lost at once.
        stall_s: seconds without progress after which a rank that others wait for is blamed.
        patient: whether a rank that says that it may take long is spared.
    """
    watched = [s for s in seen if s.beat.status not in (FAILED, LEFT)]
    for s in watched:
        if s.end is not None:
            return _verdict(s, s.end, seen)
    for s in watched:
        if s.age_s >= lost_s:
            return _verdict(s, "was stopped by a signal" if s.stopped else "stopped answering", seen)
    culprit = _laggard([s for s in watched if s.beat.still_s >= stall_s], patient=patient)
    return None if culprit is None else _verdict(culprit, f"has not moved for {culprit.beat.still_s:.0f} s", seen)


def _verdict(culprit: Seen, what: str, seen: Sequence[Seen]) -> Verdict:
    others = [s.beat for s in seen if s is not culprit and s.end is None and s.beat.status not in (FAILED, LEFT)]
    return Verdict(culprit, what, tuple(others))


def _laggard(still: Sequence[Seen], *, patient: bool) -> Seen | None:
    """Of the ranks that stand still, the one that waits for none while another waits.

    A rank waits if its main thread stands in torch.distributed, or if it has entered a collective that another has not
    (DDP waits inside of the backward pass, where no Python frame says so, and NCCL's collectives do not block).
    """
    waiting = {s.beat.rank for s in still if s.beat.waits or any(_ahead(s.beat, other.beat) for other in still)}
    if not waiting:
        return None
    blamed = [s for s in still if s.beat.rank not in waiting and s.beat.status == RUNS and not (patient and s.beat.patient)]
    return max(blamed, key=lambda s: s.beat.still_s, default=None)


def _ahead(one: Beat, other: Beat) -> bool:
    """Whether `one` has entered a collective that `other` has yet to enter."""
    return any(count > other.entered.get(group, count) for group, count in one.entered.items())


def tell(verdict: Verdict, *, checkpoint: Path | None) -> str:
    """The line that tells a verdict.

    Args:
        verdict: whom.
        checkpoint: the newest one; None where there is none.
    """
    beat, lives = verdict.culprit.beat, verdict.culprit.age_s == 0.0 and verdict.culprit.end is None
    known = [b for b in verdict.waiting if b.collective is not None]
    step = max([beat.step, *(b.step for b in known)])
    where = f" at step {step}" if step else ""
    if beat.step == step and beat.phase in _PHASES:  # the last beat of a dead rank is up to a second old
        where += f"{', ' if step or not lives else ' '}{'' if lives else 'last seen '}{_PHASES[beat.phase]}"
        where += f", at {beat.at}" if beat.at else ""
    held = "".join(f"; {_who_waits(known, b)}" for b in _one_each(known))
    saved = f"goes on from {checkpoint.name}" if checkpoint else "starts again: there is no checkpoint yet"
    return f"rank {beat.rank} (host {beat.host}) {verdict.what}{where}{held}; the same command {saved}"


def _place(beat: Beat) -> tuple[str, str]:
    return beat.phase, str(beat.collective)


def _one_each(beats: Sequence[Beat]) -> list[Beat]:
    """A beat for each place where ranks wait."""
    return list({_place(beat): beat for beat in beats}.values())


def _who_waits(beats: Sequence[Beat], like: Beat) -> str:
    ranks = [b.rank for b in beats if _place(b) == _place(like)]
    phase = f"{_PHASES[like.phase]}, " if like.phase in _PHASES else ""
    return f"{_ranks(ranks)} {'wait' if len(ranks) > 1 else 'waits'} for it {phase}in {like.collective}"


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
