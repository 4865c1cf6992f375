"""Optimizer state in files under stage 3, against one process of the native engine."""

from __future__ import annotations

from pathlib import Path

import pytest

import distllm.train.build_deepspeed as builder
from distllm.comm import World
from distllm.config.deepspeed_json import deepspeed_json
from distllm.config.errors import ConfigError, StorageError
from distllm.config.schema import Config
from distllm.engine.deepspeed_start import require_folder, require_libaio
from tests.engine.files_in_python import use_python
from tests.engine.zero_runs import COMMON, assert_equal_runs, uneven_run, zero
from tests.ranks import on_ranks
from tests.runs import metrics, tiny_config

SIZES = "model.sizes={hidden_size: 128, intermediate_size: 512, num_hidden_layers: 3, num_attention_heads: 4}"
"""What DeepSpeed puts in files is at least a megabyte a rank."""
pytestmark = pytest.mark.deepspeed


def run_in_small_groups(world: World, config: Config) -> int:
    """Of the state of a rank, 600 thousand numbers, some groups are in files and some are too small."""
    use_python()

    def small(config: Config, *, ranks: int, buffers: None) -> object:
        json = deepspeed_json(config, ranks=ranks)
        json["zero_optimization"]["sub_group_size"] = 270_000
        return json

    builder.deepspeed_json = small  # type: ignore[assignment]
    return uneven_run(world, config)


def test_state_in_files_is_saved_loaded_and_left_alone_by_a_skipped_step(tmp_path: Path) -> None:
    nvme = (*zero(3), "engine.offload_optimizer=nvme", f"engine.nvme_path={tmp_path / 'disk'}")
    for name, steps, how, ranks in (("one", 4, (), 1), ("zero", 2, nvme, 2), ("zero", 4, nvme, 2)):
        config = tiny_config(tmp_path, *COMMON, SIZES, "optim.lr=0.001", f"name={name}", f"train.steps={steps}", *how)
        run = uneven_run if ranks == 1 else run_in_small_groups
        assert on_ranks(lambda world, run=run, config=config: run(world, config), ranks, tmp_path / "ranks") == [0] * ranks
    files = [path.name for path in (tmp_path / "disk" / "zero" / "zero_stage_3" / "optimizer" / "rank1").iterdir()]
    assert len(files) == 3 and {name.partition("-")[0] for name in files} >= {"exp_avg", "exp_avg_sq"}
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "zero"
    assert metrics(two)[-2]["skipped"] == 1
    assert_equal_runs(two, one)


def test_without_libaio_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)
    with pytest.raises(ConfigError, match=r"engine.offload_optimizer=nvme: needs libaio, .*; nearest: cpu"):
        require_libaio("engine.offload_optimizer")


def test_a_path_that_is_no_folder_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = r"engine.nvme_path=.*file: no folder that can be written \(Not a directory\); nearest: a folder on a local disk, or "
    with pytest.raises(StorageError, match=told + "engine.offload_parameters=cpu"):
        require_folder(tmp_path / "file" / "run", "engine.offload_parameters")
    require_folder(tmp_path / "new" / "run", "engine.offload_parameters")
    assert list((tmp_path / "new" / "run").iterdir()) == []
