"""Every task on every layout: the same losses, a bitwise resume, and a folder that plain transformers loads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distllm import cli
from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.config.schema import Config, DistillConfig
from distllm.train.inference import export_source
from tests.ranks import on_ranks
from tests.runs import metrics, run_tiny, state
from tests.train.tasks import BERT, KINDS, TASKS, task_config

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
LAYOUTS = {
    "ddp": {"dp_replicate": 2, "dp_shard": 1}, "fsdp": {"dp_shard": 2}, "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "ddp4": {"dp_replicate": 4, "dp_shard": 1}, "fsdp4": {"dp_shard": 4},
}  # fmt: skip
SIZES = {"ddp": 2, "fsdp": 2, "hsdp": 4, "ddp4": 4, "fsdp4": 4}


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
    for name, size in SIZES.items():
        if name.endswith("4") and task not in KINDS:
            continue
        # A task may be missing in a micro-batch; four ranks have two samples each.
        train = {"micro_batch": 1} if task in ("multi_task", "gru", "sft") else {}
        close(whole, trained(config, size, tmp_path, name=name, layout=LAYOUTS[name], train=train))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_resumes_bitwise_and_is_exported(task: str, tmp_path: Path) -> None:
    config = task_config(task, tmp_path, dropout=0.1, train={"ema": 0.5}, schedule={"name": "constant"})
    cut_and_straight(config, ALONE)
    cut, straight = state(tmp_path / "runs" / "cut"), state(tmp_path / "runs" / "straight")
    assert any(name.startswith("ema.") for name in cut)
    equal(cut, straight)
    folder = export_source(str(tmp_path / "runs" / "straight"), tmp_path / "exported")
    if config.model.spec is None and task != "multi_task":
        plain_transformers_loads(folder)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", KINDS)
def test_every_kind_of_task_resumes_bitwise_on_ranks(task: str, layout: str, tmp_path: Path) -> None:
    config = task_config(task, tmp_path, dropout=0.1, layout=LAYOUTS[layout], schedule={"name": "constant"})
    on_ranks(lambda world: cut_and_straight(config, world), 2, tmp_path / "ranks")
    cut, straight = state(tmp_path / "runs" / "cut"), state(tmp_path / "runs" / "straight")
    equal(cut, straight)
    folder = export_source(str(tmp_path / "runs" / "cut"), tmp_path / "exported")
    saved = load_file(folder / "model.safetensors")
    assert saved and all(np.array_equal(straight[f"model.{name}"], tensor.numpy()) for name, tensor in saved.items())
    if task != "multi_task":
        plain_transformers_loads(folder)


def test_a_student_learns_the_same_on_ranks_and_resumes_bitwise(tmp_path: Path) -> None:
    teacher = task_config("classification", tmp_path, model={"sizes": BERT | {"hidden_size": 48}})
    trained(teacher, 1, tmp_path, name="teacher")
    distill = {"teacher": str(tmp_path / "runs" / "teacher"), "hidden": 0.5}
    config = task_config("classification", tmp_path, distill=distill, schedule={"name": "constant"})
    whole = trained(config, 1, tmp_path, name="whole")
    assert whole["loss"] != trained(config, 1, tmp_path, name="alone", distill={"teacher": None, "hidden": 0.0})["loss"]
    for name in ("ddp", "fsdp", "fsdp4"):
        close(whole, trained(config, SIZES[name], tmp_path, name=name, layout=LAYOUTS[name]))
    sharded = config.model_copy(update={"layout": config.layout.model_copy(update=LAYOUTS["fsdp"])})
    on_ranks(lambda world: cut_and_straight(sharded, world), 2, tmp_path / "ranks")
    equal(state(tmp_path / "runs" / "cut"), state(tmp_path / "runs" / "straight"))
    plain_transformers_loads(export_source(str(tmp_path / "runs" / "cut"), tmp_path / "exported"))


def test_a_student_goes_on_without_the_run_of_its_teacher(tmp_path: Path) -> None:
    """Also where that is a module of the user's own, which its weights alone do not describe."""
    trained(task_config("word_vector", tmp_path, model={"spec_args": {"embedding": 24}}), 1, tmp_path, name="teacher")
    there = tmp_path / "runs" / "teacher"
    config = task_config("word_vector", tmp_path, distill={"teacher": str(there)}, train={"steps": 2})
    assert run_tiny(ALONE, config) == 0
    there.rename(tmp_path / "elsewhere")
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    assert run_tiny(ALONE, more) == 0


def test_a_teacher_is_asked_for_all_of_its_weights_and_for_its_labels(tmp_path: Path) -> None:
    teacher = task_config("classification", tmp_path)
    trained(teacher, 1, tmp_path, name="teacher")
    there = tmp_path / "runs" / "teacher"
    config = task_config("classification", tmp_path, task={"kind": "classification", "labels": ["good", "bad"]})
    step = next((there / "checkpoints").glob("step-*"))
    folder = export_source(str(there), tmp_path / "exported")
    for source in (there, step, folder):
        taught = config.model_copy(update={"name": "student", "distill": DistillConfig(teacher=str(source))})
        with pytest.raises(ConfigError, match=r"calls a label 'bad' that is 'good' here; use task\.labels=\[bad, good\]"):
            run_tiny(ALONE, taught)
    saved = load_file(folder / "model.safetensors")
    body = {name: torch.from_numpy(tensor.numpy()) for name, tensor in saved.items() if not name.startswith("classifier.")}
    save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
    taught = teacher.model_copy(update={"name": "student", "distill": DistillConfig(teacher=str(folder))})
    rule = r"lacks classifier\.weight, classifier\.bias; a teacher needs all of its weights, trained for task\.kind=class"
    with pytest.raises(ConfigError, match=rule):
        run_tiny(ALONE, taught)


@pytest.mark.parametrize(
    ("task", "call"),
    [
        ("classification", "AutoModelForSequenceClassification.from_pretrained('out')"),
        ("multi_task", "AutoModel.from_pretrained('out')"),
        ("word_vector", "safetensors.torch.load_file('out/model.safetensors')"),
    ],
)
def test_an_export_says_what_loads_it(
    task: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(task_config(task, tmp_path), 1, tmp_path, name="run")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.run(["export", "runs/run", "out"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1].strip() == call
    source = told[-2].split()[3]
    assert source == ("out" if task == "classification" else "runs/run")
    words = ["predict", source, "--input", "tables/source.txt", "--output", "o.tsv"]
    assert cli.run([*words, "--task", "mood"] if task == "multi_task" else words) == 0


def cut_and_straight(config: Config, world: World) -> None:
    """Train as `straight`, and as `cut` in two attempts."""
    for name, steps in (("straight", 4), ("cut", 2), ("cut", 4)):
        train = config.train.model_copy(update={"steps": steps})
        assert run_tiny(world, config.model_copy(update={"name": name, "train": train})) == 0


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a and a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def plain_transformers_loads(folder: Path) -> None:
    import transformers

    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    _, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(transformers.AutoTokenizer.from_pretrained(folder).get_vocab()) >= 256
