"""Whole runs under DeepSpeed, and how they are compared with runs of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.ranks import on_ranks
from tests.runs import losses, metrics, run_tiny, state, tiny_config

COMMON = (
    "train.eval_every=0", "train.sample_every=0", "checkpoint.every=0", "checkpoint.asynchronous=false",
    "schedule.name=constant", "optim.clip=0.5", "optim.eps=1e-4",
)  # fmt: skip
"""With a small eps Adam makes a step of any gradient, so that where one is nothing but rounding, weights part by whole steps."""


def zero(stage: int, *more: str) -> tuple[str, ...]:
    return ("engine.name=deepspeed", f"engine.zero_stage={stage}", *more)


def go(place: Path, name: str, *how: str, steps: int, ranks: int = 2) -> Path:
    """Train, or train on, until `steps`."""
    config = tiny_config(place, *COMMON, f"name={name}", f"train.steps={steps}", *how)
    assert on_ranks(lambda world: run_tiny(world, config), ranks, place / "ranks") == [0] * ranks
    return place / "runs" / name


def assert_equal_runs(run: Path, reference: Path) -> None:
    """Losses, norms, weights and optimizer state of two runs agree as two layouts of one engine do."""
    mine, theirs = losses(run), losses(reference)
    assert list(mine) == list(theirs)
    np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=0, atol=2e-6)
    norms = [[line["grad_norm"] for line in metrics(folder) if "loss" in line] for folder in (run, reference)]
    np.testing.assert_allclose(*norms, rtol=2e-6)
    ours, expected = state(run), state(reference)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=5e-6, err_msg=name)
