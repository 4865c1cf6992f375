"""Exactly one W&B run a job, under every layout and engine and over a resume; no secret in any file of the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import losses, metrics, tiny_config

SECRET = "0123456789abcdef0123456789abcdef01234567"


def start(folder: Path, config: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "WANDB_MODE": "offline", "WANDB_API_KEY": SECRET, "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "distllm", "train", str(config), "track.wandb=true", *overrides]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_ranks_and_a_resume_are_one_run(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    config, run = tmp_path / "tiny.yaml", tmp_path / "runs" / "tiny"
    settings = ("layout.dp_shard=2", "train.steps=4000", "checkpoint.every=4", "train.eval_every=0")
    first = start(tmp_path, config, *settings)
    deadline = time.monotonic() + 90
    while not list((run / "checkpoints").glob("step-*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    told = first.communicate(timeout=60)[0]
    assert first.returncode == 75, told
    done = max(losses(run))
    second = start(tmp_path, config, *settings[:1], f"train.steps={done + 4}", *settings[2:])
    told = second.communicate(timeout=90)[0]
    assert second.returncode == 0, told
    assert list(losses(run)) == list(range(1, done + 5))
    offline = sorted(path.name.rsplit("-", 1)[1] for path in (run / "wandb").glob("offline-run-*"))
    assert len(offline) == 2 and len(set(offline)) == 1  # one directory an attempt, one run
    assert metrics(run)[-1]["step"] == done + 4
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "layout",
    [
        ("layout.tp=2", "layout.dp_shard=1"),
        ("layout.pp=2", "layout.dp_shard=1"),
        ("engine.name=deepspeed", "engine.zero_stage=2", "layout.dp_shard=2"),
    ],
    ids=" ".join,
)
def test_every_layout_and_engine_is_one_run_with_a_summary_of_its_node(layout: tuple[str, ...], tmp_path: Path) -> None:
    tiny_config(tmp_path)
    process = start(tmp_path, tmp_path / "tiny.yaml", *layout, "train.steps=3", "train.eval_every=0")
    told = process.communicate(timeout=110)[0]
    assert process.returncode == 0, told
    run = tmp_path / "runs" / "tiny"
    assert {path.name for path in (run / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    (data,) = run.glob("wandb/offline-run-*/*.wandb")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["node/0/ranks"] == 2 and summary["node/0/cpu_seconds"] > 0 and "node/1/ranks" not in summary
    assert all(name.encode() in data.read_bytes() for name in summary if name.startswith("node/"))
