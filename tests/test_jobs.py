"""The list of runs: state, step and loss from small files."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
import torch

from distllm import cli
from distllm.comm import World
from distllm.jobs import mark, runs_of

ONE = World(0, 1, 0, 1, torch.device("cpu"))


def run(folder: Path, name: str, *, state: dict[str, object] | None = None, lines: int = 3) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("train:\n  steps: 10\n")
    text = "".join(json.dumps({"step": step, "loss": 5.0 - step}) + "\n" for step in range(1, lines + 1))
    (path / "metrics.jsonl").write_text(text + json.dumps({"step": lines, "val_loss": 4.0}) + '\n{"step": 99, "lo')
    if state is not None:
        (path / "state.json").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": None, **state}))
    return path


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No SLURM: only what is in `bin` is found."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "runs"


def test_states(quiet: Path) -> None:
    run(quiet, "done", state={"state": "ended", "code": 0})
    run(quiet, "stopped", state={"state": "ended", "code": 75})
    run(quiet, "failed", state={"state": "ended", "code": 8})
    run(quiet, "running", state={"state": "running"})
    run(quiet, "killed", state={"state": "running", "pid": 2**22 + 1})
    run(quiet, "away", state={"state": "running", "host": "elsewhere"})
    run(quiet, "new")
    (quiet / "not-a-run").mkdir()
    found = {line.name: line.state for line in runs_of(quiet)}
    assert found == {
        "done": "done", "stopped": "stopped", "failed": "failed (8)", "running": "running", "killed": "killed", "away": "running",
        "new": "new",
    }  # fmt: skip
    line = runs_of(quiet)[0]
    assert (line.step, line.steps, line.loss) == (3, 10, 2.0) and line.age_s is not None and line.age_s < 60


def test_what_slurm_says_counts(quiet: Path) -> None:
    squeue = quiet.parent / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\necho 7 7_N/A PENDING; echo 8 8_N/A RUNNING\n")
    squeue.chmod(0o755)
    (quiet / ".launch" / "waits").mkdir(parents=True)
    (quiet / ".launch" / "waits" / "job.json").write_text('{"job": "7"}')
    run(quiet, "there", state={"state": "running", "host": "n1", "job": "8"})
    run(quiet, "gone", state={"state": "running", "host": "n1", "job": "6"})
    assert {line.name: (line.state, line.where) for line in runs_of(quiet)} == {
        "waits": ("queued", "job 7"), "there": ("running", "n1 job 8"), "gone": ("killed", "n1 job 6"),
    }  # fmt: skip


def test_each_run_of_an_array_has_a_state_of_its_own(quiet: Path) -> None:
    """Of 4 runs, 2 at a time: what waits has the number of the array, and so has the last that runs."""
    squeue = quiet.parent / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\necho 20 20_3 PENDING; echo 22 20_1 RUNNING; echo 23 20_2 RUNNING\n")
    squeue.chmod(0o755)
    for index in range(4):
        (quiet / ".launch" / f"sweep-{index}").mkdir(parents=True)
        (quiet / ".launch" / f"sweep-{index}" / "job.json").write_text(f'{{"job": "20_{index}"}}')
    run(quiet, "sweep-0", state={"state": "ended", "code": 0, "job": "21"})
    run(quiet, "sweep-1", state={"state": "running", "host": "n1", "job": "22"})
    assert {line.name: line.state for line in runs_of(quiet)} == {
        "sweep-0": "done", "sweep-1": "running", "sweep-2": "queued", "sweep-3": "queued",
    }  # fmt: skip


def test_the_end_of_a_long_file_is_enough(quiet: Path) -> None:
    path = run(quiet, "long", lines=20_000)
    os.utime(path / "metrics.jsonl", (time.time() - 7200, time.time() - 7200))
    (line,) = runs_of(quiet)
    assert line.step == 20_000 and line.loss == 5.0 - 20_000 and line.age_s is not None and 7190 < line.age_s < 7300


def test_torn_files_do_not_matter(quiet: Path) -> None:
    path = run(quiet, "torn")
    (path / "state.json").write_text('{"state": ')
    (path / "config.yaml").write_text("train: [")
    (path / "metrics.jsonl").write_bytes(b"\xff\xfe\n{}\n")
    (line,) = runs_of(quiet)
    assert (line.state, line.step, line.loss) == ("new", None, None)


def test_the_table(quiet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(quiet, "done", state={"state": "ended", "code": 0, "job": "12"})
    assert cli.run(["jobs", str(quiet)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "step", "loss", "last", "sign", "where"]
    assert row.split()[:4] == ["done", "done", "3/10", "2.0000"] and row.endswith(f"{socket.gethostname()} job 12")
    (quiet.parent / "empty").mkdir()
    assert cli.run(["jobs", str(quiet.parent / "empty")]) == 0
    assert capsys.readouterr().out == f"no runs in {quiet.parent / 'empty'}\n"
    assert cli.run(["jobs", "no/such"]) == 2
    assert capsys.readouterr().err == "distllm: no/such: no such folder of runs; nearest: distllm jobs runs\n"


def test_marks(quiet: Path) -> None:
    path = run(quiet, "a")
    mark(path, "running", world=World(1, 2, 1, 2, torch.device("cpu")))
    mark(quiet / "none", "running", world=ONE)
    assert not (path / "state.json").exists() and not (quiet / "none").exists()
    mark(path, "running", world=ONE)
    assert runs_of(quiet)[0].state == "running"
    mark(path, "ended", world=ONE, code=130)
    assert runs_of(quiet)[0].state == "stopped"
