"""Whole runs under DeepSpeed, and how they are compared with runs of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distllm.comm import World
from distllm.config.schema import Config
from distllm.data.batch import IGNORE
from distllm.engine.base import LossTerms
from distllm.train.build import build
from distllm.train.loop import train
from distllm.train.objectives import causal_lm
from tests.ranks import on_ranks
from tests.runs import losses, metrics, run_tiny, state, tiny_config

COMMON = (
    "train.eval_every=0", "train.sample_every=0", "checkpoint.every=0", "checkpoint.asynchronous=false",
    "schedule.name=constant", "optim.clip=0.5", "optim.eps=1e-4",
)  # fmt: skip
"""With a small eps Adam makes a step of any gradient, so that where one is nothing but rounding, weights part by whole steps.

With eps=1e-8 the gradients of one process in fp32, FSDP, DDP, tp and ZeRO 1 to 3 on two ranks are all within 3.8e-7 of those in
fp64 (largest error over largest gradient of a tensor), and yet weights part after one step: from fp64 by 4.1e-6 in one process,
4.5e-6 under FSDP, 7.8e-6 under tp, 1.8e-6 at stage 3. After six steps native tp is 7.7e-6 from one process, one process with
other micro-batches 2.7e-6, stage 3 3.7e-6. So that is Adam's division, in either engine, and no fault of one.
"""


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


def uneven(outputs: Any, batch: Any) -> LossTerms:
    """The loss of a part of each row that depends on its number; infinite for sample 17."""
    labels = batch.targets["labels"].clone()
    for row, number in enumerate(batch.sample_ids):
        labels[row, number % 7 * 4 :] = IGNORE  # nothing is left of every seventh
    terms = causal_lm(outputs, replace(batch, targets={**batch.targets, "labels": labels}))
    bad = 17 in batch.sample_ids and torch.is_grad_enabled()
    return replace(terms, sum=terms.sum + float("inf")) if bad else terms  # its gradient is finite


def uneven_run(world: World, config: Config) -> int:
    """Train with it; returns the exit code."""
    run = build(config, world)
    run.engine._objective = uneven  # type: ignore[attr-defined]
    return train(run)
