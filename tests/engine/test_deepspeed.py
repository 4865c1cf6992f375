"""ZeRO 1, 2 and 3 against one process of the native engine, through whole runs, and checkpoints that cross engines."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distllm.comm import World
from distllm.config.deepspeed_json import deepspeed_json
from distllm.config.errors import ConfigError
from distllm.config.schema import Config
from distllm.engine.deepspeed_start import refuse_ignored
from distllm.train.build import build
from distllm.train.loop import train
from tests.engine.zero_runs import COMMON, assert_equal_runs, go, uneven_run, zero
from tests.ranks import on_ranks
from tests.runs import losses, metrics, run_tiny, state, tiny_config
from tests.train.tasks import task_config

STEPS = 6
pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module")
def reference(place: Path) -> Path:
    """The run folder of one process of the native engine."""
    config = tiny_config(place, *COMMON, "name=one", f"train.steps={STEPS}")
    assert on_ranks(lambda world: run_tiny(world, config), 1, place / "ranks") == [0]
    return place / "runs" / "one"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_goes_from_zero_to_the_native_engine_and_back(stage: int, place: Path, reference: Path) -> None:
    offload = {2: ["engine.offload_optimizer=cpu"], 3: ["engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"]}
    name = f"stage-{stage}"
    go(place, name, *zero(stage), steps=2)
    go(place, name, steps=4, ranks=1)
    run = go(place, name, *zero(stage), *offload.get(stage, []), steps=STEPS)
    assert_equal_runs(run, reference)


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_is_near_and_goes_on_to_the_bit(stage: int, place: Path, reference: Path) -> None:
    how = zero(stage, "precision.compute=bf16")
    unbroken = go(place, f"bf16-{stage}", *how, steps=4)
    go(place, f"bf16-broken-{stage}", *how, steps=2)
    broken = go(place, f"bf16-broken-{stage}", *how, steps=4)
    assert losses(broken) == losses(unbroken)
    one = losses(reference)
    np.testing.assert_allclose(list(losses(unbroken).values()), [one[step] for step in range(1, 5)], rtol=0, atol=5e-3)
    ours, expected = state(broken), state(unbroken)
    assert all(np.array_equal(ours[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("stage", "ranks", "tp"), [(1, 1, 1), (2, 2, 1), (3, 2, 1), (2, 2, 2)])
def test_uneven_batches_are_divided_once_and_a_bad_one_is_skipped_by_all(
    stage: int, ranks: int, tp: int, tmp_path: Path
) -> None:
    folders = []
    for name, how, size in (("one", (), 1), ("zero", zero(stage, f"layout.tp={tp}"), ranks)):
        config = tiny_config(tmp_path, *COMMON, f"name={name}", "train.steps=4", *how)
        on_ranks(lambda world, config=config: uneven_run(world, config), size, tmp_path / "ranks")
        folders.append(tmp_path / "runs" / name)
    assert metrics(folders[1])[-2]["skipped"] == 1
    log = (folders[1] / "logs" / "rank-0.log").read_text()
    assert "step 3 skipped: the loss is not finite; samples 16 to 23" in log
    assert f" by DeepSpeed, ZeRO {stage}" in log
    assert_equal_runs(folders[1], folders[0])


def run_counted(world: World, config: Config) -> int:
    """Train; how often the second block was computed."""
    run = build(config, world)
    calls: list[int] = []
    first_layer = run.engine._model.get_submodule("model.layers.1.input_layernorm")  # type: ignore[attr-defined]
    first_layer.register_forward_hook(lambda *_: calls.append(1))
    assert train(run) == 0
    return len(calls)


@pytest.mark.parametrize("stage", [2, 3])
def test_blocks_are_recomputed_where_asked(
    stage: int, place: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def released(config: Config, *, ranks: int, buffers: None) -> dict[str, Any]:
        json = deepspeed_json(config, ranks=ranks)
        json["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or it keeps all of so small a model gathered
        return json

    monkeypatch.setattr("distllm.train.build_deepspeed.deepspeed_json", released)
    config = tiny_config(place, *COMMON, f"name=again-{stage}", "train.steps=2", "activation.mode=full", *zero(stage))
    trained, evaluated, written = 4, 8, 4  # micro-batches on each rank, and tokens of a sample
    counts = on_ranks(lambda world: run_counted(world, config), 2, place / "ranks")
    assert counts == [2 * trained + evaluated + written] * 2
    found, wanted = losses(place / "runs" / f"again-{stage}"), losses(reference)
    assert all(abs(loss - wanted[step]) < 2e-6 for step, loss in found.items())


def test_an_optimizer_that_takes_decay_for_a_gradient_begins_with_nothing(tmp_path: Path) -> None:
    how = ("optim.name=adam", "optim.weight_decay=0.5")
    one = go(tmp_path, "one", *how, steps=2, ranks=1)
    assert_equal_runs(go(tmp_path, "zero", *how, *zero(3), steps=2), one)


def test_without_deepspeed_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    config = tiny_config(tmp_path, *zero(2))
    with pytest.raises(ConfigError, match=r"engine.name=deepspeed: needs deepspeed; pip install 'distllm\[deepspeed\]', or"):
        build(config, World(0, 1, 0, 1, torch.device("cpu")))
    assert not (tmp_path / "runs").exists()


def test_a_model_with_a_fixed_part_is_refused(tmp_path: Path) -> None:
    """Marian's places are sines, which never learn."""
    config = task_config("marian", tmp_path, engine={"name": "deepspeed"})
    told = r"engine.name=deepspeed: trains all weights, and .*embed_positions.weight of marian is fixed; nearest: engine"
    with pytest.raises(ConfigError, match=told):
        build(config, World(0, 1, 0, 1, torch.device("cpu")))


def test_what_deepspeed_does_not_do_as_told_is_an_error() -> None:
    json = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2}, "bf16": {"enabled": False},
        "fp16": {"enabled": False, "loss_scale": 1.0},
    }  # fmt: skip
    says = SimpleNamespace(
        train_batch_size=lambda: 8, train_micro_batch_size_per_gpu=lambda: 2, gradient_accumulation_steps=lambda: 2,
        gradient_clipping=lambda: 1.0, zero_optimization_stage=lambda: 2, bfloat16_enabled=lambda: False,
        fp16_enabled=lambda: False, loss_scale=lambda: 1.0,
    )  # fmt: skip
    refuse_ignored(says, json)
    says.gradient_clipping = lambda: 0.0
    with pytest.raises(ConfigError, match=r"DeepSpeed takes gradient_clipping=0.0, and was told 1.0"):
        refuse_ignored(says, json)
    says.gradient_clipping = lambda: 1.0
    json["zero_optimization"] = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for offload in (None, SimpleNamespace(device="none")):
        says.zero_offload_optimizer = lambda offload=offload: offload
        with pytest.raises(ConfigError, match=r"offload_optimizer.device=(None|none), and was told cpu"):
            refuse_ignored(says, json)
