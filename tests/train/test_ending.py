"""The last step of a run, and the step of its best evaluation, where something comes between them and what follows."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm.comm import World
from distllm.config.errors import EXIT_OK, EXIT_STOPPED, DivergedError
from distllm.train import validate as validating
from distllm.train.build import Run, build, close
from distllm.train.loop import train
from tests.runs import metrics, tiny_config

ONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def start() -> Iterator[Any]:
    """Builds runs of one process, closed after the test."""
    made: list[Run] = []

    def one(folder: Path, *overrides: str) -> Run:
        made.append(build(tiny_config(folder, "train.sample_tokens=0", *overrides), ONE))
        return made[-1]

    yield one
    for run in made:
        close(run)


def evaluated(folder: Path) -> list[int]:
    return [line["step"] for line in metrics(folder / "runs" / "tiny") if "val_loss" in line]


def test_a_run_that_is_stopped_in_its_last_step_is_evaluated_by_the_next_start(
    start: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = start(tmp_path, "train.steps=3")
    step = made.engine.train_step

    def signalled(*args: Any, **settings: Any) -> Any:
        if made.engine.updates == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **settings)

    made.engine.train_step = signalled
    assert train(made) == EXIT_STOPPED and made.engine.updates == 3 and evaluated(tmp_path) == []
    assert train(start(tmp_path, "train.steps=3")) == EXIT_OK and evaluated(tmp_path) == [3]
    assert "is done" not in capfd.readouterr().err
    assert train(start(tmp_path, "train.steps=3")) == EXIT_OK and evaluated(tmp_path) == [3]
    assert "is done, 3 steps" in capfd.readouterr().err


def test_the_best_checkpoint_is_named_by_the_next_start_if_a_kill_came_before(start: Any, tmp_path: Path) -> None:
    best = "train.keep_best=true"
    made = start(tmp_path, "train.steps=4", "train.eval_every=2", best)
    real, checkpoints = made.checkpoints.mark_best, tmp_path / "runs" / "tiny" / "checkpoints"

    def killed(step: int) -> None:
        if step == 4:
            made.checkpoints.wait()  # the checkpoint is in place, and the link not yet
            raise KeyboardInterrupt
        real(step)

    made.checkpoints.mark_best = killed
    with pytest.raises(KeyboardInterrupt):
        train(made)
    assert os.readlink(checkpoints / "best") == "step-2" and (checkpoints / "step-4").is_dir()
    # No later evaluation is better: without the link the best checkpoint would be retired, as any other.
    again = start(tmp_path, "train.steps=7", "train.eval_every=0", "train.keep_best=false", "train.patience=0")
    again.checkpoints.wait()
    assert os.readlink(checkpoints / "best") == "step-2", "nobody asked for the best"
    again = start(tmp_path, "train.steps=7", best)
    again.checkpoints.wait()
    assert again.start.best.step == 4 and os.readlink(checkpoints / "best") == "step-4"


def test_a_checkpoint_of_another_run_is_not_named_the_best_of_this_one(start: Any, tmp_path: Path) -> None:
    assert train(start(tmp_path, "train.steps=2", "train.keep_best=true", "train.eval_every=1")) == EXIT_OK
    first = tmp_path / "runs" / "tiny" / "checkpoints" / "step-2"
    made = start(tmp_path, "name=other", f"resume={first}", "train.steps=3", "train.keep_best=true")
    made.checkpoints.wait()
    assert made.engine.updates == 2 and not (tmp_path / "runs" / "other" / "checkpoints" / "best").exists()


def test_a_run_that_stopped_early_says_what_trains_it_on(start: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    early = ("train.steps=20", "train.eval_every=1", "train.patience=2", "optim.lr=1e-12", "train.best_metric=val_accuracy")
    made = start(tmp_path, *early)
    assert train(made) == EXIT_OK and made.engine.updates == 3
    there = tmp_path / "runs" / "tiny"
    command = f"distllm train {there} train.patience="
    assert command in capfd.readouterr().out
    assert train(start(tmp_path, *early)) == EXIT_OK
    told = capfd.readouterr().err
    assert f"{there} is done, it stopped early at step 3; to train on: {command}4" in told
    made = start(tmp_path, *early, "train.patience=4")
    assert train(made) == EXIT_OK and made.engine.updates == 5


def test_the_last_evaluation_is_compared_with_those_before_by_the_same_samples(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = validating.evaluate

    def easier(step: Any, batches: Any, **settings: Any) -> Any:
        """A validation set that is easier than the first batch of it, whatever the weights."""
        batches = list(batches)
        return replace(real(step, batches, **settings), loss=2.0 if len(batches) > 1 else 3.0)

    monkeypatch.setattr(validating, "evaluate", easier)
    options = ("train.steps=5", "train.eval_every=1", "train.eval_batches=1", "train.patience=2")
    made, there = start(tmp_path, *options), tmp_path / "runs" / "tiny"
    assert train(made) == EXIT_OK and made.engine.updates == 3
    assert [line["val_loss"] for line in metrics(there) if "val_loss" in line] == [3.0, 3.0, 3.0, 2.0]
    assert os.readlink(there / "checkpoints" / "best") == "step-1", "none was better than the first"
    size = made.resolved.micro_batch
    assert f" at step 1, by {size} of {made.samples.validation_size} validation samples\n" in capfd.readouterr().out
    again = start(tmp_path, *options)
    assert again.start.best.bad == 2 and train(again) == EXIT_OK and again.engine.updates == 3


def test_a_diverged_run_that_goes_on_has_its_steps_looked_at_before_it_is_ended(start: Any, tmp_path: Path) -> None:
    """On a GPU a step's verdict comes with the next one, so the count of a checkpoint says nothing of the step just taken."""
    made = start(tmp_path, "train.steps=5", "train.max_skips=3", "train.log_every=5", "train.eval_every=0",
                 "optim.implementation=fused", "checkpoint.every=0")  # fmt: skip
    made.engine._skips_on_device = True  # as on a GPU
    made.engine.skips_in_a_row = 3
    assert train(made) == EXIT_OK and made.engine.updates == 5
    objective = made.engine._objective
    made = start(tmp_path, "train.steps=9", "train.max_skips=3")
    made.engine._skips_on_device = True
    made.engine._objective = lambda outputs, batch: replace(terms := objective(outputs, batch), sum=terms.sum * float("nan"))
    with pytest.raises(DivergedError, match=r"^3 steps in a row"):
        train(made)


def test_a_diverged_run_keeps_the_time_that_it_took(start: Any, tmp_path: Path) -> None:
    made = start(tmp_path, "train.max_skips=2", "train.eval_every=0")
    objective = made.engine._objective

    def late(outputs: Any, batch: Any) -> Any:
        terms = objective(outputs, batch)
        return replace(terms, sum=terms.sum * float("nan")) if made.engine.updates == 6 else terms

    made.engine._objective = late
    with pytest.raises(DivergedError):
        train(made)
    told = metrics(tmp_path / "runs" / "tiny")[-1]
    again = start(tmp_path, "train.max_skips=2", "train.eval_every=0")
    assert told["step"] == again.engine.updates == 6 and again.start.seconds >= told["time_s"] > 0


def test_a_text_of_a_step_that_is_taken_again_is_written_once(start: Any, tmp_path: Path) -> None:
    options = ("train.steps=6", "train.sample_tokens=3", "train.sample_every=2", "train.eval_every=0", "checkpoint.every=4")
    made = start(tmp_path, *options)
    real = made.engine.train_step

    def killed(*args: Any, **settings: Any) -> Any:
        if made.engine.updates == 3:
            raise KeyboardInterrupt
        return real(*args, **settings)

    made.engine.train_step = killed
    with pytest.raises(KeyboardInterrupt):
        train(made)
    assert train(start(tmp_path, *options)) == EXIT_OK
    text = (tmp_path / "runs" / "tiny" / "samples.txt").read_text(encoding="utf-8")
    assert [int(line.split()[2].rstrip(",")) for line in text.splitlines() if line.startswith("--- step")] == [2, 4, 6]


def test_a_run_that_begins_from_one_that_stopped_early_has_a_patience_of_its_own(start: Any, tmp_path: Path) -> None:
    early = ("train.steps=20", "train.eval_every=1", "train.patience=2", "train.best_metric=val_accuracy")
    made = start(tmp_path, *early, "optim.lr=1e-12")
    assert train(made) == EXIT_OK and made.engine.updates == 3
    made = start(tmp_path, *early, "name=other", f"resume={tmp_path / 'runs' / 'tiny'}", "optim.lr=1e-12")
    assert made.start.best.step is None and train(made) == EXIT_OK and made.engine.updates == 6
    assert os.readlink(tmp_path / "runs" / "other" / "checkpoints" / "best") == "step-4"


def test_a_run_that_begins_from_another_is_no_attempt_of_its_tracked_run(start: Any, tmp_path: Path) -> None:
    """W&B leaves out steps that a run has already, so those from OLD's checkpoint on would be lost in OLD's."""
    made, first = start(tmp_path, "train.steps=2", "train.eval_every=0"), tmp_path / "runs" / "tiny"
    made.tracker.run_id = "abcd"
    assert train(made) == EXIT_OK
    assert start(tmp_path, "train.steps=3", "train.eval_every=0").tracker.run_id == "abcd"
    assert start(tmp_path, "name=other", f"resume={first}", "train.steps=3").tracker.run_id is None
    assert not (tmp_path / "runs" / "other" / "wandb_id").exists()
