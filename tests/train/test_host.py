"""What a rank sets in its own process."""

from __future__ import annotations

import random

import numpy as np
import torch

from distllm.train.host import random_state, restore_random_state, seed_rank

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
