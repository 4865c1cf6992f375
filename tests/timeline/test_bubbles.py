"""What torch's schedules execute, simulated, idles as long as the formulas say."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from distllm.config.check_pipeline import schedule_problems
from distllm.config.schedule_csv import Order, Work
from distllm.timeline.bubbles import bubble
from distllm.timeline.order import schedule_order
from distllm.timeline.simulate import simulate

MULTI = {
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
VIRTUAL = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "interleaved_zero_bubble": 1, "zbv": 2, "dualpipev": 2}


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Millions of slots that hold no circles: looking for some takes two thirds of the time."""
    gc.disable()
    yield
    gc.enable()


def legal(schedule: str, *, virtual: int, ranks: range = range(2, 17)) -> Iterator[tuple[int, int]]:
    """All (p, m) with p <= 16 and m <= 64 that the schedule takes."""
    for pp in ranks:
        for microbatches in range(1, 65):
            if not any(schedule_problems(schedule, pp=pp, virtual=virtual, microbatches=microbatches)):
                yield pp, microbatches


@pytest.mark.parametrize("schedule", VIRTUAL)
def test_every_rank_idles_as_long_as_the_formula_says(schedule: str) -> None:
    virtual, seen = VIRTUAL[schedule], 0
    for pp, microbatches in legal(schedule, virtual=virtual):
        formula = bubble(schedule, pp=pp, microbatches=microbatches)
        if formula is None:
            continue
        seen += 1
        timeline = simulate(schedule_order(schedule, pp=pp, virtual=virtual, microbatches=microbatches))
        work = microbatches * virtual * 3
        assert timeline.busy == (work,) * pp
        assert timeline.idle == (formula,) * pp, (pp, microbatches)
        assert timeline.length == work + formula
        if schedule == "zbv":  # the paper's: ranks that do not wait for each other at the end of a step never do
            assert timeline.idle_inside == (0.0,) * pp
    assert seen > 350


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "interleaved_zero_bubble"])
@pytest.mark.parametrize("virtual", [1, 3])
def test_idle_time_does_not_depend_on_the_stages_of_a_rank(schedule: str, virtual: int) -> None:
    for pp, microbatches in ((2, 4), (4, 8), (4, 9), (8, 16)):
        timeline = simulate(schedule_order(schedule, pp=pp, virtual=virtual, microbatches=microbatches))
        assert timeline.idle == (bubble(schedule, pp=pp, microbatches=microbatches),) * pp


def test_formulas_hold_for_other_costs() -> None:
    costs = {"F": 3.0, "I": 4.0, "W": 2.0, "B": 6.0}
    for schedule in ("gpipe", "1f1b", "interleaved_1f1b"):
        order = schedule_order(schedule, pp=4, virtual=VIRTUAL[schedule], microbatches=8)
        assert simulate(order, costs=costs).idle == (3 * 9.0,) * 4 == (bubble(schedule, pp=4, microbatches=8, costs=costs),) * 4


def test_zero_bubble_is_a_third_of_1f1b() -> None:
    one, third = (bubble(name, pp=8, microbatches=16) for name in ("1f1b", "interleaved_zero_bubble"))
    assert one is not None and third is not None and one == 3 * third


def test_interleaving_divides_the_share_of_idle_time() -> None:
    """(p-1)/(v m) of the ideal time (arXiv 2104.04473)."""
    for virtual in (1, 2, 4):
        timeline = simulate(schedule_order("interleaved_1f1b", pp=4, virtual=virtual, microbatches=8))
        assert timeline.idle[0] / timeline.busy[0] == 3 / (virtual * 8)


def computed(actions: Any) -> Order:
    """Torch's order without its pauses and messages, pairs as steps."""
    return tuple(
        tuple(
            tuple(Work(a.stage_index, a.computation_type.value, a.microbatch_index) for a in (action.sub_actions or (action,)))
            for action in actions[rank]
            if action is not None
        )
        for rank in sorted(actions)
    )


@pytest.mark.parametrize("schedule", MULTI)
def test_orders_are_those_of_torch(schedule: str) -> None:
    virtual = 2
    for pp, microbatches in legal(schedule, virtual=virtual, ranks=range(2, 6)):
        torchs = MULTI[schedule].__new__(MULTI[schedule])  # without stages, which would need process groups
        torchs._n_microbatches, torchs.pp_group_size, torchs.n_local_stages = microbatches, pp, virtual
        torchs._num_stages = torchs.num_stages = virtual * pp
        torchs.number_of_rounds = max(1, microbatches // pp)
        torchs.microbatches_per_round = microbatches // torchs.number_of_rounds
        order = computed({rank: torchs._calculate_single_rank_operations(rank) for rank in range(pp)})
        assert schedule_order(schedule, pp=pp, virtual=virtual, microbatches=microbatches) == order, (pp, microbatches)


class Stage:
    """Takes the calls of a torch schedule with one stage and writes them down."""

    def __init__(self, rank: int, pp: int) -> None:
        self.stage_index, self.num_stages, self.is_last = rank, pp, rank == pp - 1
        self.calls: list[Work] = []
        self.get_fwd_recv_ops = self.get_fwd_send_ops = self.get_bwd_recv_ops = self.get_bwd_send_ops = lambda number: []

    def forward_one_chunk(self, number: int, *args: Any, **options: Any) -> None:
        self.calls.append(Work(self.stage_index, "F", number))

    def backward_one_chunk(self, number: int, **options: Any) -> None:
        self.calls.append(Work(self.stage_index, "B", number))

    def perform_reduce_grad(self, factor: int) -> None:
        pass


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_orders_of_single_stages_are_what_torch_executes(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its `_get_pipeline_order`: that of 1F1B numbers the last rank's micro-batches from 1 (torch 2.13)."""
    kind = schedules.ScheduleGPipe if schedule == "gpipe" else schedules.Schedule1F1B
    monkeypatch.setattr(kind, "_initialize_stage", lambda self, *args: None)
    for pp, microbatches in ((2, 2), (2, 5), (4, 4), (4, 7), (5, 12)):
        order = schedule_order(schedule, pp=pp, virtual=1, microbatches=microbatches)
        for rank in range(pp):
            stage = Stage(rank, pp)
            kind(stage, microbatches)._step_microbatches()  # type: ignore[arg-type]
            assert tuple((work,) for work in stage.calls) == order[rank]
