from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from distllm.checkpoint.find import step_folder
from tests import kill_sweep
from tests.checkpoint.conftest import write_two


def test_a_run_that_is_killed_four_times_ends_as_the_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short form of the sweep whose record is in docs/benchmarks/kill_sweep.json."""
    out = tmp_path / "record.json"
    command = ["kill_sweep.py", "--kills", "4", "--steps", "16", "--folder", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        kill_sweep.main()
    record = json.loads(out.read_text())
    assert ended.value.code == 0 and not record["problems"] and record["bitwise_equal"], record["problems"]
    assert record["kills"] == 4 and record["inside_a_save"] >= 2 and record["losses_compared_a_run"] == 16
    assert capsys.readouterr().out.count("good steps") == 4


def test_the_sweep_sees_a_torn_and_a_lost_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (2, 4):
        write_two(folder, step=step)
    sweep = object.__new__(kill_sweep.Sweep)  # without the unbroken run
    sweep.kills, sweep.problems, sweep._wanted_kills = [], [], 3
    kill = kill_sweep.Kill(1, "broken-1", "process", 1.0, True, [])
    assert sweep._look(kill, folder, [2]) == [2, 4] and sweep.problems == []
    file = step_folder(folder, 4) / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert sweep._look(kill, folder, [2, 4]) == [2]
    assert [line.split(": ")[1] for line in sweep.problems] == [
        "torn under a checkpoint's name",
        "a checkpoint was lost",
        "too few are left",
    ]
