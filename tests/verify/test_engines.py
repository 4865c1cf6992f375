"""The axis of engines, as far as it needs no DeepSpeed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from distllm.checkpoint.chunk import Chunk
from distllm.cli import run
from distllm.config.errors import ConfigError
from distllm.config.schema import EngineConfig
from distllm.verify.asked import Options
from distllm.verify.command import Verification, _tasks
from distllm.verify.deepspeed_trial import NOT_EXPOSED, _given
from distllm.verify.engines import NATIVE, EngineChoice, engines_of, parse_engines
from distllm.verify.judge import DEEPSPEED_BOUNDS, QUANTITIES, Verdict
from distllm.verify.layouts import layout_of
from distllm.verify.planted_deepspeed import DEEPSPEED_FAULTS
from distllm.verify.rows import Row
from distllm.verify.table import certificate
from tests.runs import tiny_config
from tests.verify.small import verification_of


def test_deepspeed_stands_for_its_three_stages() -> None:
    engines = list(engines_of(parse_engines("native, deepspeed")))
    assert [engine.label for engine in engines] == ["native", "deepspeed ZeRO 1", "deepspeed ZeRO 2", "deepspeed ZeRO 3"]
    own = EngineConfig(name="deepspeed", zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    assert engines[0].config(own) == EngineConfig()
    assert engines[2].config(own) == own.model_copy(update={"zero_stage": 2, "offload_parameters": "none"})
    assert engines[3].config(own) == own
    files = EngineConfig(name="deepspeed", zero_stage=3, offload_optimizer="nvme", nvme_path="/local")
    assert engines[3].config(files) == EngineConfig(name="deepspeed", zero_stage=3, offload_optimizer="cpu")
    parameters = files.model_copy(update={"offload_parameters": "nvme"})
    assert [engines[stage].config(parameters).offload_parameters for stage in (1, 2, 3)] == ["none", "none", "cpu"]
    assert engines[3].config(parameters).nvme_path is None
    assert [engine.precision("fp64") for engine in engines] == ["fp64", "fp32", "fp32", "fp32"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("deepspeeds", "--engines=deepspeeds: must be of native, deepspeed, with commas; nearest: deepspeed"),
        (" ,", "names no engine; nearest: native,deepspeed"),
    ],
)
def test_an_engine_that_is_none_is_one_line(text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        parse_engines(text)


@pytest.mark.parametrize("words", [["--engines", "deepspeed"], ["engine.name=deepspeed"]])
def test_without_deepspeed_it_says_what_to_do(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    tiny_config(tmp_path, prepared=False)
    assert run(["verify", str(tmp_path / "tiny.yaml"), *words, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told == ["distllm: engine.name=deepspeed: needs deepspeed; pip install 'distllm[deepspeed]', or engine.name=native"]
    assert not (tmp_path / "out").exists()


def rows_of(verification: Verification) -> list[str]:
    return [row.name for row in _tasks(verification)]


def test_the_rows_of_deepspeed_are_what_its_rules_allow(tmp_path: Path) -> None:
    engines = ["native", "deepspeed"]
    verification = verification_of(tmp_path, options=Options(ranks=(2, 16), engines=engines, precisions=("fp64", "bf16")))
    names = rows_of(verification)
    assert "dp_replicate 2" in names and "dp_replicate 2, deepspeed ZeRO 2, fp32" not in names  # its layouts are dp_shard's
    for stage in (1, 2, 3):
        assert f"dp_shard 2, deepspeed ZeRO {stage}, fp32" in names and f"dp_shard 2, deepspeed ZeRO {stage}, bf16" in names
    assert "dp_shard 16" in names and "dp_shard 16, deepspeed ZeRO 2, fp32" not in names  # no fake world
    asked = Options(layouts=[layout_of({"cp": 2})], engines=["deepspeed"])
    verification = Verification(verification.config, verification.data, asked)
    assert rows_of(verification) == [f"cp 2, deepspeed ZeRO {stage}, fp32" for stage in (1, 2, 3)]
    row = verification.run(layout_of({"cp": 2}), engine=EngineChoice("deepspeed", 2))
    assert row.refused[0].startswith("layout.cp=2: ") and "engine.name=native" in row.refused[0]


def test_where_its_rules_allow_nothing_one_row_says_why(tmp_path: Path) -> None:
    verification = verification_of(tmp_path, "optim.l2=0.1", options=Options(ranks=(1, 2), engines=["deepspeed"]))
    assert rows_of(verification) == [f"one process, deepspeed ZeRO {stage}, fp32" for stage in (1, 2, 3)]
    assert "optim.l2=0.1: engine.name=deepspeed adds no penalty" in verification.row(next(_tasks(verification))).refused[0]


def test_a_gradient_lies_in_its_piece_as_the_weight_does() -> None:
    flat, other = torch.arange(10.0), torch.arange(4.0)
    flat.grad, other.grad = torch.arange(10.0) * 10, torch.zeros(4)
    chunks = {
        "a#0": Chunk(flat.narrow(0, 0, 2), (8,), (3,), True), "b#0": Chunk(flat.narrow(0, 4, 6).view(2, 3), (4, 3), (1, 0), True),
        "c": Chunk(torch.zeros(2), (2,), (0,), True),
    }  # fmt: skip
    found = dict(_given(chunks, [other, flat]))
    assert set(found) == {"a#0", "b#0"} and found["a#0"].data.tolist() == [0.0, 10.0] and found["a#0"].offset == (3,)
    assert found["b#0"].data.tolist() == [[40.0, 50.0, 60.0], [70.0, 80.0, 90.0]]


def test_the_certificate_names_engine_stage_and_tolerance() -> None:
    zero = EngineChoice("deepspeed", 3)
    seen = dict.fromkeys(("loss", "gradient", "norm", "start", "weight"), "somewhere")
    good = Verdict(dict.fromkeys(QUANTITIES, 1e-7), seen, {"a": 1e-7}, (), 5000, bounds=DEEPSPEED_BOUNDS["fp32"])
    bad = Verdict(dict.fromkeys(QUANTITIES, 1e-2), seen, {"a": 1e-2}, ("loss: too far",), 5000, bounds=DEEPSPEED_BOUNDS["fp32"])
    rows = [
        Row(layout_of({"dp_shard": 2}), "fp32", zero, verdict=good, not_exposed=NOT_EXPOSED),
        Row(layout_of({"dp_shard": 4}), "fp32", zero, verdict=bad, not_exposed=NOT_EXPOSED),
    ]
    told = certificate(rows, what="tiny", guards=[], faults=[], files=[], config="tiny.yaml", holds=False)
    text = "\n".join(told)
    assert "1 of 2 layouts and stages compute what one process of the native engine computes (deepspeed fp32)" in text
    assert "losses, gradients, norms, weights agree to 7 digits" in text and "weight 2e-05, start to the bit" in text
    assert "not exposed: clip: " in text and "DIFFERENT: dp_shard 4, deepspeed ZeRO 3, fp32:" in text
    assert told[-1].endswith("distllm verify tiny.yaml --layouts dp_shard=4 --engines deepspeed")
    assert rows[0].as_json()["errors"]["clip"] is None and rows[0].as_json()["zero_stage"] == 3
    assert rows[1].worst > rows[0].worst > 0


def test_the_page_lists_every_bug_of_the_engine() -> None:
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
    assert len({fault.name for fault in DEEPSPEED_FAULTS}) == len(DEEPSPEED_FAULTS)
    for fault in DEEPSPEED_FAULTS:
        assert fault.engine != NATIVE
        assert f"| {fault.name} | {fault.what} | {layout_of(fault.layout).name}, {fault.engine.label} |" in page
