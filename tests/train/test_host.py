"""What a rank sets in its own process."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from distllm.comm import World
from distllm.config.machine import cores
from distllm.config.schema import Config, TrainConfig
from distllm.train.host import random_state, restore_random_state, seed_rank, tune_host

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float, float]:
    return random.random(), float(np.random.rand()), float(np.random.standard_normal()), torch.rand(1).item()


def test_the_random_state_comes_back_whole() -> None:
    seed_rank(3, dp_rank=0, step=0)
    draw()  # a normal number leaves one cached: it is part of the state
    state = random_state(CPU)
    assert all(tensor.dtype == torch.uint8 for tensor in state.values())
    wanted = [draw(), draw()]
    seed_rank(4, dp_rank=0, step=0)
    restore_random_state({name: tensor.clone() for name, tensor in state.items()}, device=CPU)
    assert [draw(), draw()] == wanted


def test_seeds_repeat_and_ranks_differ() -> None:
    drawn = {}
    for seed, rank, step in ((1, 0, 0), (1, 1, 0), (2, 0, 0), (1, 0, 7), (1, 0, 0)):
        seed_rank(seed, dp_rank=rank, step=step)
        drawn.setdefault((seed, rank, step), []).append(draw())
    assert drawn[1, 0, 0][0] == drawn[1, 0, 0][1]
    assert len({values[0] for values in drawn.values()}) == 4


@pytest.mark.parametrize(
    ("told", "local_size", "threads", "wanted"),
    [
        ("3", 1, 0, 3), ("3,2", 1, 0, 3), ("3", 1, 5, 5), ("3", 2, 0, max(1, cores() // 2)), ("many", 1, 0, cores()),
        (None, 1, 0, cores()),
    ],
)
def test_a_process_alone_keeps_to_the_threads_that_the_user_set(
    told: str | None, local_size: int, threads: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    before = torch.get_num_threads()
    config = Config(name="host", train=TrainConfig(threads=threads))
    try:
        tune_host(config, World(0, local_size, 0, local_size, CPU), allocator=False)
        assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)
