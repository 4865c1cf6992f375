"""A run that DeepSpeed began and a SIGKILL ended goes on under the native engine, on other ranks, as if nothing had been."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from distllm.cli import run as distllm
from distllm.comm import World
from distllm.config.schema import Config
from distllm.train.build import build
from distllm.train.loop import train
from tests.ranks import on_ranks
from tests.recorded import read, recording
from tests.runs import losses, tiny_config

pytestmark = pytest.mark.deepspeed

STEPS, SAVED, TAKEN = 12, 4, 6


def trained(world: World, config: Config, record: Path, *, kill_at: int | None) -> int:
    """Train; every rank kills itself as it begins the step after `kill_at`."""
    with recording(record):
        run = build(config, world)
        step = run.engine.train_step

        def taken(*args: Any, **options: Any) -> Any:
            if run.engine.updates == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **options)

        run.engine.train_step = taken  # type: ignore[method-assign]
        return train(run)


def go(place: Path, name: str, *how: str, ranks: int, record: str, kill_at: int | None = None) -> Path:
    quiet = ("train.eval_every=0", "train.sample_every=0", "checkpoint.asynchronous=false", f"checkpoint.every={SAVED}")
    config = tiny_config(place, f"name={name}", f"train.steps={STEPS}", "optim.eps=1e-4", *quiet, *how)
    on_ranks(lambda world: trained(world, config, place / record, kill_at=kill_at), ranks, place / "ranks")
    return place / "runs" / name


def test_zero_2_on_two_ranks_killed_goes_on_as_four_native_shards(tmp_path: Path) -> None:
    unbroken = go(tmp_path, "unbroken", ranks=1, record="whole")
    zero = ("engine.name=deepspeed", "engine.zero_stage=2", "layout.dp_shard=2")
    with pytest.raises(AssertionError, match="the rank died without an answer"):
        go(tmp_path, "broken", *zero, ranks=2, record="before", kill_at=TAKEN)
    broken = tmp_path / "runs" / "broken"
    assert max(losses(broken)) == TAKEN and not (broken / "checkpoints" / f"step-{TAKEN}").exists()
    go(tmp_path, "broken", "layout.dp_shard=4", ranks=4, record="after")

    whole, before, after = (read(tmp_path / name) for name in ("whole", "before", "after"))
    begun = [(number * 8, number * 8 + 8) for number in range(STEPS)]
    assert list(whole) == begun and sorted(before) == begun[: TAKEN + 1] and sorted(after) == begun[SAVED:]
    assert all(rows == whole[step] and len(rows) == 8 for part in (before, after) for step, rows in part.items())
    mine, theirs = losses(broken), losses(unbroken)
    assert list(mine) == list(theirs) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=0, atol=2e-6)
    for name in ("unbroken", "broken"):
        assert distllm(["export", str(tmp_path / "runs" / name), str(tmp_path / name)]) == 0
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("broken", "unbroken"))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=5e-6, err_msg=name)
