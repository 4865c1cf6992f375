"""Ranks live as long as their trial; why one failed is told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.verify.ranks import Broken, on_ranks


def broken(found: object) -> Broken:
    assert isinstance(found, Broken), found
    assert not multiprocessing.active_children()
    return found


def test_answers_come_in_the_order_of_the_ranks() -> None:
    def rank(world: World) -> tuple[int, float]:
        total = torch.tensor(float(world.rank))
        dist.all_reduce(total)
        return world.rank, float(total)

    assert on_ranks(rank, 3, timeout_s=30.0) == [(0, 3.0), (1, 3.0), (2, 3.0)]
    assert not multiprocessing.active_children()


def test_a_refusal_is_told_with_its_rules() -> None:
    def rank(world: World) -> None:
        raise ConfigError(["layout.tp=3: must divide the 4 attention heads; nearest: 4"])

    assert broken(on_ranks(rank, 2, timeout_s=30.0)).problems == ("layout.tp=3: must divide the 4 attention heads; nearest: 4",)


def test_the_cause_is_told_and_not_its_echo() -> None:
    def rank(world: World) -> None:
        if world.rank == 1:
            raise RuntimeError("the true cause")
        dist.all_reduce(torch.ones(1))

    assert broken(on_ranks(rank, 2, timeout_s=30.0)).reason == "RuntimeError: the true cause"


def test_an_interrupt_that_reached_a_rank_alone_is_one_of_all() -> None:
    def rank(world: World) -> None:
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        dist.all_reduce(torch.ones(1))

    with pytest.raises(KeyboardInterrupt):
        on_ranks(rank, 2, timeout_s=30.0)
    assert not multiprocessing.active_children()


def test_a_rank_that_dies_ends_the_trial() -> None:
    def rank(world: World) -> None:
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60.0)

    assert "rank 1 died without a word" in broken(on_ranks(rank, 2, timeout_s=30.0)).reason


def test_a_rank_that_hangs_ends_the_trial() -> None:
    def rank(world: World) -> None:
        if world.rank == 1:
            time.sleep(60.0)

    assert "no answer of rank 1 in 1 s" in broken(on_ranks(rank, 2, timeout_s=1.0)).reason


def test_one_rank_of_a_fake_world_sees_the_size_of_all() -> None:
    def rank(world: World) -> tuple[int, int]:
        dist.all_reduce(torch.ones(1))
        return dist.get_rank(), dist.get_world_size()

    assert on_ranks(rank, 4096, timeout_s=30.0, fake=(0, 4095)) == [(0, 4096), (4095, 4096)]
