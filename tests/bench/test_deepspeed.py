"""Engines as an axis of the grid: DeepSpeed's cells beside native ones, and a row for what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distllm.bench import measure as measuring
from distllm.bench.rows import MEASURED, REFUSED
from distllm.cli import run
from tests.runs import tiny_config

pytestmark = pytest.mark.deepspeed


def reduced(cell: dict[str, Any]) -> int:
    """Bytes sent in all-reduces."""
    return sum(size for name, (_, size) in cell["figures"]["collectives"].items() if name.endswith("all_reduce"))


def test_a_grid_over_engines_batches_and_precisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measuring.matrix_rate
    monkeypatch.setattr(measuring, "matrix_rate", lambda device, dtype, world: real(device, dtype, world, size=64))
    tiny_config(tmp_path)
    grids = (
        "engine.name=native,deepspeed train.micro_batch=2,4 ranks=2",
        "engine.name=deepspeed engine.zero_stage=3 precision.compute=bf16,fp64 train.compile=false,true ranks=2",
    )
    short = ["--steps", "2", "--warmup", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert run(["bench", str(tmp_path / "tiny.yaml"), *short, *(word for grid in grids for word in ("--grid", grid))]) == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())["cells"]
    first, second = found[:4], found[4:]
    assert [cell["status"] for cell in first] == [MEASURED] * 4, [cell["why"] for cell in first]
    for native, zero in zip(first[:2], first[2:], strict=True):
        assert (native["engine"], native["zero_stage"], zero["engine"], zero["zero_stage"]) == ("native", None, "deepspeed", 2)
        assert zero["figures"]["loss"] == pytest.approx(native["figures"]["loss"], rel=0, abs=2e-6)  # the same work was timed
        assert zero["figures"]["tokens_per_s"] > 0 and len(zero["figures"]["step_s"]) == 2
    gradients = 4 * (257 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32)
    assert gradients < first[3]["figures"]["sent"] < 2 * gradients
    assert reduced(first[1]) < 100 and reduced(first[3]) >= gradients  # FSDP scatters them, ZeRO 2 adds them in buckets
    assert [cell["status"] for cell in second] == [MEASURED, REFUSED, REFUSED, REFUSED]
    assert "train.compile=true: engine.name=deepspeed is not compiled" in second[1]["why"]
    assert "precision.compute=fp64: DeepSpeed keeps its weights in fp32" in second[2]["why"]
    assert "5 measured, 3 refused" in capsys.readouterr().out
