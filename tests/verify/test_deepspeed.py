"""DeepSpeed's rows for real: every stage equal to one process of the native engine, and its planted bugs caught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distllm.cli import run
from distllm.verify.command import Verification, _plant
from distllm.verify.engines import EngineChoice
from distllm.verify.layouts import layout_of
from distllm.verify.planted import Fault
from distllm.verify.planted_deepspeed import DEEPSPEED_FAULTS
from distllm.verify.rows import Row
from tests.runs import tiny_config
from tests.verify.small import verification_of

pytestmark = pytest.mark.deepspeed


def row_of(verification: Verification, stage: int, *, ranks: int = 2, precision: str = "fp64") -> Row:
    return verification.run(layout_of({"dp_shard": ranks}), engine=EngineChoice("deepspeed", stage), precision=precision)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 4), (3, 2)])
def test_every_stage_is_equal_and_shows_gradients_and_weights(stage: int, ranks: int, verification: Verification) -> None:
    row = row_of(verification, stage, ranks=ranks)
    assert row.equal, (row.refused, row.broken, row.verdict and row.verdict.problems)
    assert row.verdict is not None and set(row.verdict.worst) == {"loss", "gradient", "norm", "start", "weight"}
    assert 0 < row.verdict.errors["gradient"] < 2e-6 and 0 < row.verdict.errors["weight"] < 2e-5  # something was compared
    assert row.precision == "fp32" and not row.traffic


@pytest.mark.parametrize(("stage", "precision"), [(2, "fp64"), (3, "bf16")])
def test_offloaded_and_rounded_rows_are_equal(stage: int, precision: str, tmp_path: Path) -> None:
    verification = verification_of(
        tmp_path, "engine.name=deepspeed", "engine.zero_stage=3", "engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"
    )
    row = row_of(verification, stage, precision=precision)
    assert row.equal, (row.refused, row.broken, row.verdict and row.verdict.problems)
    assert row.verdict is not None and row.verdict.bounds.weight == (2e-5 if precision == "fp64" else None)


@pytest.mark.parametrize("fault", DEEPSPEED_FAULTS, ids=lambda fault: fault.name)
def test_a_planted_bug_is_caught(fault: Fault, verification: Verification) -> None:
    told = _plant(verification, fault)
    assert told["caught"] is True, told


def test_clipping_that_is_not_in_force_is_no_place_for_a_bug(tmp_path: Path) -> None:
    (fault,) = (fault for fault in DEEPSPEED_FAULTS if fault.name == "never clipped")
    told = _plant(verification_of(tmp_path, "optim.clip=100.0"), fault)
    assert told["caught"] is None, told


def test_the_command_tells_row_by_row_what_is_equal_to_which_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(tmp_path)
    argv = ["verify", str(tmp_path / "tiny.yaml"), "--engines", "native,deepspeed", "--layouts", "dp_shard=2;cp=2"]
    code = run([*argv, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert code == 0, printed
    record = json.loads((tmp_path / "out" / "verify.json").read_text())
    rows = {(row["engine"], row["zero_stage"], row["name"]): row for row in record["layouts"]}
    for stage in (1, 2, 3):
        row = rows["deepspeed", stage, "dp_shard 2"]
        assert row["verdict"] == "equal" and row["tolerances"]["loss"] == 2e-6 and row["tolerances"]["weight"] == 2e-5
        assert row["errors"]["clip"] is None and row["errors"]["loss"] < 2e-6
        assert set(row["not_exposed"]) == {"gradient", "clip", "collectives"}
        assert rows["deepspeed", stage, "cp 2"]["verdict"] == "refused"
    assert rows["native", None, "cp 2"]["verdict"] == rows["native", None, "dp_shard 2"]["verdict"] == "equal"
    assert set(record["bounds"]) == {"fp64", "deepspeed fp32"}
    assert "3 of 3 layouts and stages compute what one process of the native engine computes (deepspeed fp32)" in printed
    assert "tolerances: loss 2e-06, gradient 2e-06" in printed and "collectives are DeepSpeed's own and not judged" in printed
