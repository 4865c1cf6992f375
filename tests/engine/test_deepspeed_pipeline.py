"""DeepSpeed's pipeline against one process of the native engine, through whole runs, and checkpoints that cross engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distllm.comm import World
from distllm.config.schema import Config
from distllm.train.build import build
from tests.engine.zero_runs import COMMON, assert_equal_runs, go, uneven_run, zero
from tests.ranks import on_ranks
from tests.runs import TINY, losses, metrics, run_tiny, state, tiny_config
from tests.train.tasks import task_config

STEPS = 6
PIPELINE = zero(1, "layout.pp=2")
WIDE = (*PIPELINE, "train.micro_batch=1")
"""For 4 ranks: with 2 data-parallel ones a step still has 4 micro-batches."""
THREE = (
    "model.sizes=" + json.dumps({**TINY, "num_hidden_layers": 4, "tie_word_embeddings": False}), "train.global_batch=6",
    "train.steps=4",
)  # fmt: skip
"""Untied, and 3 micro-batches a step: DeepSpeed's division by them is not exact."""
pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module")
def reference(place: Path) -> Path:
    """The run folder of one process of the native engine; embedding and head are one, and clipping is in force."""
    return go(place, "one", steps=STEPS, ranks=1)


@pytest.mark.parametrize(("how", "ranks"), [(PIPELINE, 2), (WIDE, 4), ((*PIPELINE, "engine.offload_optimizer=cpu"), 2)], ids=str)
def test_it_trains_as_one_process(how: tuple[str, ...], ranks: int, place: Path, reference: Path) -> None:
    run = go(place, f"pipeline-{ranks}-{len(how)}", *how, steps=STEPS, ranks=ranks)
    assert_equal_runs(run, reference)
    assert min(line["grad_norm"] for line in metrics(reference) if "loss" in line) > 0.5  # all are clipped
    (mine,), (theirs,) = ([line["val_loss"] for line in metrics(folder) if "val_loss" in line] for folder in (run, reference))
    assert abs(mine - theirs) < 2e-6
    assert (run / "samples.txt").read_text()


def test_a_run_goes_from_it_to_native_layouts_and_back(place: Path, reference: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "crossing"
    go(place, name, *WIDE, steps=2, ranks=4)
    assert "SEED_LAYERS" not in (out := capfd.readouterr().out) and "stage=0 layers" not in out and "topology" not in out
    go(place, name, "layout.dp_shard=2", steps=3)
    go(place, name, *PIPELINE, steps=4)
    assert_equal_runs(go(place, name, "layout.pp=2", steps=STEPS), reference)


def test_stages_between_the_ends_and_a_split_of_ones_own(place: Path) -> None:
    one = go(place, "three-one", *THREE, steps=4, ranks=1)
    three = ("layout.pp=3", "layout.pp_split=[1, 2, 1]")
    go(place, "three", *PIPELINE, *THREE, *three, steps=2, ranks=3)
    fewer = ("train.micro_batch=6", "activation.mode=full")  # micro-batches than ranks: one
    assert_equal_runs(go(place, "three", *PIPELINE, *THREE, *three, *fewer, steps=4, ranks=3), one)


def test_it_goes_with_tensor_parallel_ranks(place: Path, reference: Path) -> None:
    assert_equal_runs(go(place, "tensor", *PIPELINE, "layout.tp=2", steps=STEPS, ranks=4), reference)


def test_bf16_is_near_and_goes_on_to_the_bit(place: Path, reference: Path) -> None:
    how = (*PIPELINE, "precision.compute=bf16")
    unbroken = go(place, "bf16", *how, steps=4)
    go(place, "bf16-broken", *how, steps=2)
    broken = go(place, "bf16-broken", *how, steps=4)
    assert losses(broken) == losses(unbroken)
    one = losses(reference)
    np.testing.assert_allclose(list(losses(unbroken).values()), [one[step] for step in range(1, 5)], rtol=0, atol=5e-3)
    ours, expected = state(broken), state(unbroken)
    assert all(np.array_equal(ours[name], value) for name, value in expected.items())


def test_uneven_batches_are_divided_once_and_a_bad_one_is_skipped_by_all(tmp_path: Path) -> None:
    folders = []
    for name, how, size in (("one", (), 1), ("wide", WIDE, 4)):
        config = tiny_config(tmp_path, *COMMON, f"name={name}", "train.steps=4", *how)
        on_ranks(lambda world, config=config: uneven_run(world, config), size, tmp_path / "ranks")
        folders.append(tmp_path / "runs" / name)
    assert metrics(folders[1])[-2]["skipped"] == 1
    assert "step 3 skipped: the loss is not finite; samples 16 to 23" in (folders[1] / "logs" / "rank-0.log").read_text()
    assert_equal_runs(folders[1], folders[0])


def test_micro_batches_of_other_lengths(tmp_path: Path) -> None:
    runs = []
    for name, ranks, changes in (
        ("one", 1, {}), ("two", 2, {"engine": {"name": "deepspeed", "zero_stage": 1}, "layout": {"pp": 2}})
    ):  # fmt: skip
        changes = {**changes, "optim": {"lr": 0.01, "eps": 1e-4}, "checkpoint": {"every": 0}}
        config = task_config("classification", tmp_path / name, **changes)
        assert on_ranks(lambda world, config=config: run_tiny(world, config), ranks, tmp_path / "ranks") == [0] * ranks
        runs.append(tmp_path / name / "runs" / "small")
    for key in ("loss", "val_loss"):
        mine, theirs = ([line[key] for line in metrics(run) if key in line] for run in reversed(runs))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6, err_msg=key)


def answers(world: World, config: Config) -> Any:
    """What a run's model answers, and its whole tensors on the first rank."""
    run = build(config, world)
    with run.engine.inference() as model:
        outputs = model(input_ids=torch.arange(12).view(2, 6))
    tensors = [(name, tensor.numpy().copy()) for name, tensor in run.engine.full_tensors()]
    whole = dict(tensors)
    assert len(whole) == len(tensors)  # what two stages have is told once
    return getattr(outputs, "logits", outputs).numpy().copy(), whole


def test_it_answers_and_is_exported_as_one_process(place: Path, reference: Path) -> None:
    found: dict[str, Any] = {}
    for name, how, ranks in (("one", (), 1), ("wide", WIDE, 4)):
        config = tiny_config(place, *COMMON, f"name=asked-{name}", f"resume={reference / 'checkpoints' / f'step-{STEPS}'}", *how)
        found[name] = on_ranks(lambda world, config=config: answers(world, config), ranks, place / "ranks")
    ((logits, whole),) = found["one"]
    for mine, _ in found["wide"]:
        np.testing.assert_allclose(mine, logits, rtol=0, atol=2e-6)
    tensors = found["wide"][0][1]
    assert tensors.keys() == whole.keys() and all(np.array_equal(tensors[name], value) for name, value in whole.items())
    assert all(value.size == 0 for value in found["wide"][3][1].values())
