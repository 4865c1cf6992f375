"""In which order each rank of a pipeline computes: what torch's schedules execute, written down without torch.

p ranks, v stages a rank, m micro-batches. Work on a micro-batch is of four kinds: F forward; B the whole backward pass, or
its two halves: I the gradients of the inputs, W those of the weights.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from distllm.config.check_pipeline import stage_owners
from distllm.config.schedule_csv import Kind, Order, Step, Work


def schedule_order(schedule: str, *, pp: int, virtual: int, microbatches: int) -> Order:
    """What each rank computes, in order.

    Args:
        schedule: one of `SCHEDULES` but csv, whose file is an order (`read_order`).
        pp: ranks.
        virtual: stages of a rank.
        microbatches: of one step.

    Sources: GPipe arXiv 1811.06965; 1F1B arXiv 2006.09503; interleaved arXiv 2104.04473; zero bubble arXiv 2401.10241 (ZB-H1
    and ZBV); DualPipe arXiv 2412.19437, its V form github.com/deepseek-ai/DualPipe.
    """
    make = {
        "gpipe": _gpipe, "1f1b": _one_forward_one_backward, "interleaved_1f1b": _interleaved,
        "interleaved_zero_bubble": _interleaved_zero_bubble, "zbv": _zbv, "dualpipev": _dualpipev,
    }[schedule]  # fmt: skip
    stages = stage_owners(schedule, pp=pp, virtual=virtual)
    mine = [[stage for stage, owner in enumerate(stages) if owner == rank] for rank in range(pp)]
    return tuple(
        tuple(one if isinstance(one[0], Work) else (one,) for one in make(rank, mine[rank], pp, microbatches))
        for rank in range(pp)
    )


def _gpipe(rank: int, stages: list[int], p: int, m: int) -> Iterator[Work]:
    kinds: tuple[Kind, Kind] = ("F", "B")
    for kind in kinds:
        yield from (Work(stages[0], kind, n) for n in range(m))


def _one_forward_one_backward(rank: int, stages: list[int], p: int, m: int) -> Iterator[Work]:
    warmup = min(m, p - rank)
    yield from (Work(stages[0], "F", n) for n in range(warmup))
    for n in range(m):
        yield Work(stages[0], "B", n)
        if warmup + n < m:
            yield Work(stages[0], "F", warmup + n)


def _looped(stages: list[int], p: int, m: int, *, backward: bool) -> list[tuple[int, int]]:
    """The (stage, micro-batch) pairs of a rank with several stages: a round of micro-batches a stage, stage by stage."""
    turn = stages[::-1] if backward else stages
    size = m // max(1, m // p)  # of a round: p, or a little more where p does not divide m
    return [(stage, first + n) for first in range(0, m, size) for stage in turn for n in range(size)]


def _interleaved(rank: int, stages: list[int], p: int, m: int) -> Iterator[Work]:
    forward, backward = (_looped(stages, p, m, backward=flag) for flag in (False, True))
    size = m // max(1, m // p)
    warmup = min((len(stages) - 1) * size + 2 * (p - 1 - rank), len(forward))
    yield from (Work(stage, "F", n) for stage, n in forward[:warmup])
    for step, (stage, n) in enumerate(backward):
        if warmup + step < len(forward):
            ahead, number = forward[warmup + step]
            yield Work(ahead, "F", number)
        yield Work(stage, "B", n)


def _interleaved_zero_bubble(rank: int, stages: list[int], p: int, m: int) -> Iterator[Work]:
    """As interleaved, with half the warm-up; the weights' halves run `rank` behind and fill the end."""
    forward, backward = (_looped(stages, p, m, backward=flag) for flag in (False, True))
    size = m // max(1, m // p)
    warmup = min((len(stages) - 1) * size + p - 1 - rank, len(forward))
    yield from (Work(stage, "F", n) for stage, n in forward[:warmup])
    for step, (stage, n) in enumerate(backward):
        if warmup + step < len(forward):
            ahead, number = forward[warmup + step]
            yield Work(ahead, "F", number)
        yield Work(stage, "I", n)
        if step >= rank:
            late, number = backward[step - rank]
            yield Work(late, "W", number)
    yield from (Work(stage, "W", n) for stage, n in backward[max(0, len(backward) - rank) :])


class _Counting:
    """Numbers the micro-batches of each stage and kind as they come."""

    def __init__(self, stages: list[int]) -> None:
        self.down, self.up = stages
        self.count: Counter[tuple[int, str]] = Counter()
        self.late: deque[tuple[int, int]] = deque()  # input halves whose weights' halves are still to come

    def next(self, stage: int, kind: Kind) -> Work:
        key = (stage, "I" if kind == "B" else kind)
        number = self.count[key]
        self.count[key] += 1
        if kind == "I":
            self.late.append((stage, number))
        return Work(stage, kind, number)

    def weights(self) -> Iterator[Work]:
        """The oldest weights' half that is still to come, if there is one."""
        if self.late:
            stage, number = self.late.popleft()
            yield Work(stage, "W", number)


def _zbv(rank: int, stages: list[int], p: int, m: int) -> Iterator[Work]:
    """The V schedule of zero bubble; it is laid out for 2p - 1 micro-batches at least, and those that are not there left out."""
    work = _Counting(stages)
    down, up, whole = work.down, work.up, max(2 * p - 1, m)
    plan: list[tuple[int, Kind]] = [(down, "F")] * (2 * (p - rank) - 1)
    for _ in range(rank):
        plan += [(up, "F"), (down, "F")]
    for _ in range(p - rank):
        plan += [(up, "F"), (up, "I"), (up, "W")]
    forwards = {down: 2 * p - rank - 1, up: p}
    while forwards[up] < forwards[down] or forwards[down] < whole:
        if forwards[down] < whole:
            plan.append((down, "F"))
            forwards[down] += 1
        plan += [(down, "I"), (down, "W"), (up, "F"), (up, "I"), (up, "W")]
        forwards[up] += 1
    for _ in range(rank):
        plan += [(down, "I"), (up, "I")]
    for _ in range(p - rank):
        plan += [(down, "I"), (down, "W")]
    for stage in (up, down):
        plan += [(stage, "W") for _ in range(rank)]
    every = [work.next(stage, kind) for stage, kind in plan]
    return (one for one in every if one.microbatch < m)


def _dualpipev(rank: int, stages: list[int], p: int, m: int) -> Iterator[Work | Step]:
    """DualPipe's V form. The pairs that overlap on DeepSeek's kernels are one step: torch runs one after the other, and sends
    what both give at the end."""
    work = _Counting(stages)
    down, up, rest = work.down, work.up, p - rank - 1
    yield from (work.next(down, "F") for _ in range(2 * rest))
    for _ in range(rank + 1):
        yield work.next(down, "F")
        yield work.next(up, "F")
    for _ in range(rest):
        yield work.next(up, "I")
        yield from work.weights()
        yield work.next(up, "F")
    for turn in range(m - 2 * p + rank + 1):
        pair = work.next(down, "F"), work.next(up, "B")
        yield from pair if turn == 0 and rank == p - 1 else (pair,)  # its neighbour is itself: nothing to overlap yet
        yield work.next(up, "F"), work.next(down, "B")
    for _ in range(rest):
        yield work.next(up, "B")
        yield work.next(up, "F"), work.next(down, "B")
    for step in range(rank + 1):  # from the middle on in halves: the inputs first, which others wait for
        halves = (rank + 1) // 2
        yield work.next(up, "I" if step > halves or (step == halves and rank % 2 == 1) else "B")
        yield work.next(down, "I" if step >= halves else "B")
    for _ in range(rest):
        yield from work.weights()
        yield work.next(down, "I")
    for _ in range(rank + 1):
        yield from work.weights()
