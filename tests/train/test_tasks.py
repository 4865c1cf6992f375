"""Every task on every layout: the same losses, a bitwise resume, and a folder that plain transformers loads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distllm.comm import World
from distllm.config.schema import Config
from distllm.train.inference import export_source
from tests.ranks import on_ranks
from tests.runs import metrics, run_tiny, state
from tests.train.tasks import TASKS, task_config

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
LAYOUTS = {"ddp": {"dp_replicate": 2, "dp_shard": 1}, "fsdp": {"dp_shard": 2}, "hsdp": {"dp_replicate": 2, "dp_shard": 2}}


def figures(folder: Path) -> dict[str, list[float]]:
    """Training losses, gradient norms and validation figures in order."""
    lines = metrics(folder)
    told = {name for line in lines for name in line}
    names = sorted(name for name in told if name in ("loss", "grad_norm", "tokens") or name.startswith("val_"))
    return {name: [line[name] for line in lines if name in line] for name in names}


def trained(config: Config, size: int, folder: Path, **changes: Any) -> dict[str, list[float]]:
    """Train on `size` ranks under a name of its own."""
    data = config.model_dump(mode="json")
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    changed = Config.model_validate(data)
    if size == 1:
        assert run_tiny(ALONE, changed) == 0
    else:
        assert on_ranks(lambda world: run_tiny(world, changed), size, folder / "ranks") == [0] * size
    return figures(folder / "runs" / changed.name)


def close(a: dict[str, list[float]], b: dict[str, list[float]]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith("pearson"):  # of predictions that hardly differ yet: rounding, not the layout, decides its digits
            continue
        assert np.allclose(a[name], b[name], rtol=2e-5, atol=2e-6), (name, a[name], b[name])


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_the_same_on_every_layout(task: str, tmp_path: Path) -> None:
    config = task_config(task, tmp_path)
    whole = trained(config, 1, tmp_path, name="whole")
    assert len(whole["loss"]) == 4 and all(map(math.isfinite, whole["loss"])) and whole["loss"][-1] != whole["loss"][0]
    for name, layout in LAYOUTS.items():
        size = 4 if name == "hsdp" else 2
        train = {"micro_batch": 1} if task in ("multi_task", "gru", "sft") else {}  # a task may be missing in a micro-batch
        close(whole, trained(config, size, tmp_path, name=name, layout=layout, train=train))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_resumes_bitwise_and_is_exported(task: str, tmp_path: Path) -> None:
    config = task_config(task, tmp_path, dropout=0.1, train={"ema": 0.5})
    trained(config, 1, tmp_path, name="whole")
    first = config.model_dump(mode="json") | {"name": "cut"}
    run_tiny(ALONE, Config.model_validate({**first, "train": {**first["train"], "steps": 2}, "schedule": {"name": "constant"}}))
    whole = Config.model_validate({**first, "name": "straight", "schedule": {"name": "constant"}})
    run_tiny(ALONE, whole)
    run_tiny(ALONE, Config.model_validate({**first, "schedule": {"name": "constant"}}))
    cut, straight = state(tmp_path / "runs" / "cut"), state(tmp_path / "runs" / "straight")
    assert cut.keys() == straight.keys() and any(name.startswith("ema.") for name in cut)
    assert all(np.array_equal(cut[name], straight[name]) for name in cut)
    folder = export_source(str(tmp_path / "runs" / "whole"), tmp_path / "exported")
    if config.model.spec is None and task != "multi_task":
        import transformers

        architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
        _, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert len(transformers.AutoTokenizer.from_pretrained(folder).get_vocab()) >= 256
