"""Who is blamed, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distllm.watch.beat import FAILED, LEFT, STUCK, Beat, Collective, from_bytes
from distllm.watch.process import Process
from distllm.watch.verdict import Seen, judge, tell

REDUCE = Collective("all_reduce", 417, "dp_shard")


def beat(rank: int, **about: Any) -> Beat:
    facts = {"step": 120, "phase": "backward", "patient": False, "entered": {"0": 9}} | about
    return Beat(rank, 5, f"node{rank // 2}", Process("", 1, ""), **facts)  # type: ignore[arg-type]


def seen(rank: int, *, age_s: float = 0.0, end: str | None = None, stopped: bool = False, **about: Any) -> Seen:
    return Seen(beat(rank, **about), age_s, end, stopped)


def blamed(*ranks: Seen, patient: bool = True) -> tuple[int, str] | None:
    verdict = judge(ranks, lost_s=10.0, stall_s=60.0, patient=patient)
    return None if verdict is None else (verdict.culprit.beat.rank, verdict.what)


def waits(rank: int, **about: Any) -> Seen:
    return seen(rank, **({"still_s": 61.0, "entered": {"0": 10}, "collective": REDUCE} | about))


def test_a_rank_that_answers_and_moves_is_not_blamed() -> None:
    assert blamed(seen(0), seen(1, age_s=9.9), seen(2, still_s=59.0)) is None


def test_a_dead_process_is_blamed_at_once_and_silence_after_a_while() -> None:
    assert blamed(seen(0), seen(1, end="died"), seen(2)) == (1, "died")
    assert blamed(seen(0), seen(1), seen(2, age_s=10.0)) == (2, "stopped answering")
    assert blamed(seen(0), seen(1), seen(2, age_s=10.0, stopped=True)) == (2, "was stopped by a signal")
    assert blamed(seen(0, age_s=30.0), seen(1, end="died")) == (1, "died")  # what is known goes before what is guessed


@pytest.mark.parametrize("status", [FAILED, LEFT])
def test_one_that_tells_its_own_error_or_has_left_is_never_blamed(status: str) -> None:
    assert blamed(seen(0), seen(1, status=status, age_s=99.0, end="died", still_s=99.0), waits(2)) is None


def test_the_rank_behind_is_blamed_when_it_holds_up_another() -> None:
    assert blamed(waits(0), seen(1, still_s=70.0), waits(2)) == (1, "has not moved for 70 s")
    assert blamed(waits(0, still_s=59.0), seen(1, still_s=70.0)) is None  # nobody has waited that long
    assert blamed(waits(0), seen(1, still_s=2.0)) is None  # it moves


def test_a_rank_whose_main_thread_is_in_a_receive_waits_though_no_count_says_so() -> None:
    first, last = seen(0, still_s=61.0, waits=True, entered={}), seen(1, still_s=61.0, entered={})
    assert blamed(first, last) == (1, "has not moved for 61 s")
    assert blamed(seen(0, still_s=61.0, waits=True), seen(1, still_s=61.0, waits=True)) is None  # nobody knows who


def test_counts_are_compared_in_common_groups_only() -> None:
    assert blamed(waits(0, entered={"0": 9, "1": 50}), seen(1, still_s=61.0, entered={"0": 9, "2": 3})) is None


def test_of_a_chain_the_first_is_blamed() -> None:
    chain = [waits(0, entered={"a": 5}), waits(1, entered={"a": 4, "b": 5}), seen(2, still_s=61.0, entered={"b": 4})]
    assert blamed(*chain) == (2, "has not moved for 61 s")


def test_a_patient_rank_is_spared_until_the_collective_itself_gives_up() -> None:
    ranks = (waits(0, status=STUCK), seen(1, still_s=70.0, patient=True))
    assert blamed(*ranks) is None
    assert blamed(*ranks, patient=False) == (1, "has not moved for 70 s")


def line(*ranks: Seen, checkpoint: Path | None = Path("runs/x/checkpoints/step-100")) -> str:
    verdict = judge(ranks, lost_s=10.0, stall_s=60.0)
    assert verdict is not None
    return tell(verdict, checkpoint=checkpoint)


def test_the_line_says_who_where_and_who_waits_in_what() -> None:
    last = seen(3, still_s=70.0, phase="forward", at="my/model.py:33 in forward")
    assert line(waits(0), waits(1), waits(2), last) == (
        "rank 3 (host node1) has not moved for 70 s at step 120, in the forward pass, at my/model.py:33 in forward; "
        "ranks 0-2 wait for it in the backward pass, in all_reduce #417 of dp_shard; the same command goes on from step-100"
    )


def test_ranks_that_wait_in_different_places_are_told_apart() -> None:
    gather = Collective("all_gather", 7, "all ranks")
    ranks = (waits(0), waits(1, phase="data", collective=gather), seen(2, age_s=10.0), waits(3), waits(4, collective=None))
    assert line(*ranks).split("; ")[1:3] == [
        "ranks 0, 3 wait for it in the backward pass, in all_reduce #417 of dp_shard",
        "rank 1 waits for it while it waited for data, in all_gather #7 of all ranks",
    ]


def test_of_a_dead_rank_no_more_is_said_than_is_known() -> None:
    known = "rank 1 (host node0) died at step 120, last seen in the backward pass; rank 0 waits "
    assert line(waits(0), seen(1, end="died")).startswith(known)
    old = "rank 1 (host node0) died at step 120; rank 0 waits "  # its last beat is of an earlier step than the others are at
    assert line(waits(0), seen(1, end="died", step=119, at="m.py:1 in f")).startswith(old)
    early = "rank 1 (host node0) died, last seen while it started; the same command starts again: there is no checkpoint yet"
    assert line(seen(0, step=0), seen(1, end="died", step=0, phase="start"), checkpoint=None) == early


def test_a_beat_survives_its_journey_and_a_torn_one_is_none() -> None:
    sent = beat(1, collective=REDUCE, at="x", still_s=1.5)
    assert from_bytes(sent.to_bytes().ljust(4096)) == sent
    assert from_bytes(beat(1).to_bytes()) == beat(1)
    for torn in (b"", b"{}", b"\0" * 4096, sent.to_bytes()[:-9]):
        assert from_bytes(torn) is None
