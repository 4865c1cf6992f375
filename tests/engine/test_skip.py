"""A step that is not finite on any rank is skipped on all, as if it had never been taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distllm.comm import World
from distllm.config.schema import OptimConfig, PrecisionConfig
from distllm.data.batch import Batch
from distllm.engine.base import LossTerms
from distllm.train.objectives import causal_lm
from tests.ranks import on_ranks
from tests.toy import Settings, step_of, toy_engine

POISON = 3  # the row of the batch whose loss or gradient is spoiled


def spoil(kind: str) -> Any:
    """An objective that is not finite where a row has sample id `POISON`."""

    def objective(outputs: torch.Tensor, batch: Batch) -> LossTerms:
        terms = causal_lm(outputs, batch)
        if POISON not in batch.sample_ids:
            return terms
        if kind == "loss":  # an infinite loss with finite gradients: the norm alone would not notice
            return replace(terms, sum=terms.sum + float("inf"))
        return replace(terms, sum=terms.sum + (outputs.sum() * 0.0).sqrt())  # 0/0 in the backward pass only

    return objective


def run(world: World, settings: Settings, *, firsts: list[int], kind: str) -> dict[str, Any]:
    engine = toy_engine(world, settings)
    engine._objective = spoil(kind)
    told, mesh = [], engine.parallel.mesh
    for first in firsts:
        batches = step_of(first, size=8, accumulation=1, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
        out = engine.train_step(batches, samples=range(first, first + 8))
        told += [(skip.samples.start, skip.samples.stop, skip.reason) for skip in out.skipped]
    weights = {name: tensor.numpy().copy() for name, tensor in engine.full_tensors()}
    return {"told": told, "weights": weights, "updates": engine.updates, "row": engine.skips_in_a_row}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("layout", [{}, {"replicate": 2}, {"shard": 2}])
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_skipped_step_leaves_no_trace(kind: str, layout: dict[str, int], optimizer: Any, tmp_path: Path) -> None:
    settings = Settings(optim=OptimConfig(name=optimizer, lr=1e-2), **layout)
    ranks = 2 if layout else 1
    # The batch at 0 holds the poisoned sample, on rank 0 only.
    with_poison = on_ranks(lambda world: run(world, settings, firsts=[8, 0, 16], kind=kind), ranks, tmp_path)
    without = on_ranks(lambda world: run(world, settings, firsts=[8, 16], kind=kind), ranks, tmp_path)
    for result in with_poison:
        assert result["told"] == [(0, 8, f"the {kind} is not finite")]
        assert (result["updates"], result["row"]) == (2, 0)
    for name, value in without[0]["weights"].items():
        np.testing.assert_array_equal(with_poison[0]["weights"][name], value, err_msg=name)


def test_skips_in_a_row_are_counted_and_end_with_a_good_step() -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    assert run(world, Settings(), firsts=[0, 0, 0], kind="loss")["row"] == 3
    assert run(world, Settings(), firsts=[0, 0, 8], kind="loss")["row"] == 0


def test_an_fp16_overflow_halves_the_scale_and_is_forgiven() -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    settings = Settings(precision=PrecisionConfig(compute="fp16", initial_loss_scale=2.0**24))
    engine = toy_engine(world, settings)
    batches = step_of(8, size=8, accumulation=1, dp_rank=0, dp_size=1)
    out = engine.train_step(batches, samples=range(8, 16))
    assert len(out.skipped) == 1 and engine.updates == 0
    assert engine.skips_in_a_row == 0
    assert engine.facts()["loss_scale"]["value"] == 2.0**23
    for _ in range(20):
        engine.train_step(batches, samples=range(8, 16))
    assert engine.updates > 0
