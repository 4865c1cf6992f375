"""The whole command: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distllm.cli import run
from distllm.engine import local
from distllm.verify.asked import words_of
from distllm.verify.command import Verification
from distllm.verify.engines import engines_of
from distllm.verify.judge import Verdict
from distllm.verify.layouts import layout_of
from distllm.verify.rows import Row
from distllm.verify.table import certificate, growing
from tests.runs import tiny_config
from tests.verify.small import plain, verification_of


def test_every_layout_of_two_ranks_is_equal_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config(tmp_path)
    out = tmp_path / "out"
    code = run(["verify", str(tmp_path / "tiny.yaml"), "--ranks", "1,2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    record = json.loads((out / "verify.json").read_text())
    found = {layout["name"]: layout for layout in record["layouts"]}
    assert {"one process", "dp_replicate 2", "dp_shard 2", "pp 2", "cp 2", "tp 2"} == set(found)
    assert record["holds"] and record["guards"] == [] and len(record["config_digest"]) == 64
    assert record["versions"]["torch"] and record["hardware"]["cores"] and record["bounds"]["fp64"]["gradient"] == 1e-12
    equal = [layout for layout in found.values() if layout["verdict"] == "equal"]
    assert len(equal) == len(found)
    for layout in equal:
        assert layout["errors"]["gradient"] < 1e-12 and layout["errors"]["weight"] < 1e-12
        assert layout["sent"] == layout["formula"]
    assert (out / "errors.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "layouts compute what one process computes (fp64)" in printed
    assert f"written {out / 'verify.json'}" in printed and "next    distllm train" in printed


def test_a_layout_that_differs_ends_with_nine_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config(tmp_path)
    monkeypatch.setattr(local, "_sharding_groups", lambda parameter: ())  # each rank clips by its own norm
    code = run(["verify", str(tmp_path / "tiny.yaml"), "--layouts", "dp_shard=2", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert code == 9
    assert "DIFFERENT: dp_shard 2:" in printed and "norm: " in printed and "is above 1e-12" in printed
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["holds"] is False


def test_a_dead_model_trips_the_guards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config(tmp_path)
    argv = ["verify", str(tmp_path / "tiny.yaml"), *plain(alive=False), "--layouts", "dp_shard=2"]
    assert run([*argv, "--out", str(tmp_path / "out")]) == 9
    printed = capsys.readouterr().out
    assert "guard: the gradient is zero at every step: " in printed and "guard: the loss does not move" in printed


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--layouts dp_sard=2", "--layouts=dp_sard=2: unknown key; nearest: dp_shard=2"),
        ("--layouts dp_shard=8192", "--layouts=dp_shard 8192: 8,192 ranks; verify goes up to 4,096; nearest: dp_shard=4096"),
        ("--layouts tp=x", "--layouts=tp=x: input should be a valid integer; nearest: tp=2"),
        ("--layouts ;", "--layouts=;: names no layout; nearest: dp_shard=2"),
        ("--ranks 2,x", "--ranks=2,x: must be numbers from 1 to 4,096 with commas; nearest: 1,2,4,8"),
        ("--precision fp8", "--precision=fp8: must be of fp64, fp32, bf16, with commas; nearest: fp64"),
        ("--device tpu", "--device=tpu: must be cpu or cuda; nearest: cpu"),
        ("data.sources.0.path=nowhere.txt data.sources.0.hint=null --layouts dp_shard=2", "data.sources.0.path=nowhere.txt: "),
        ("model.sizes.hidden=8 --layouts dp_shard=2", "model.sizes.hidden: llama has no such size; the nearest is "),
    ],
)
def test_bad_input_is_one_clear_line(words: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config(tmp_path)
    code = run(["verify", str(tmp_path / "tiny.yaml"), *words.split(), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err.strip().splitlines()
    told = [text for text in err if text.startswith("distllm: ")]  # beside what is told of progress, where a log is open
    assert code in (2, 3) and len(told) == 1, err
    assert line in told[0]


def test_a_module_of_ones_own_that_is_too_large_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config(tmp_path)
    argv = ["verify", str(tmp_path / "tiny.yaml"), *plain(hidden=50_000), "--layouts", "dp_shard=2"]
    assert run([*argv, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "verify takes a module of your own as it is" in told and "nearest: a smaller model.spec_args.hidden=..." in told


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("axis", ["dp_replicate", "dp_shard", "tp"])
def test_lower_precisions_have_bounds_of_their_own(precision: str, axis: str, verification: Verification) -> None:
    row = verification.run(layout_of({axis: 2}), precision=precision)
    assert row.equal, row


def test_text_that_is_not_prepared_is_read_in_part(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, prepared=False)
    assert not Path(config.data.store).exists()
    verification = verification_of(tmp_path, f"data.store={tmp_path / 'other'}", "data.tokenizer.kind=chars")
    assert verification.run(layout_of({"dp_replicate": 2})).equal


def test_a_table_grows_on_a_terminal_and_tells_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with growing(2) as watch:
        watch.starts("dp_shard 2")
        watch.add(Row(layout_of({"dp_shard": 2}), "fp64", refused=("[a rule]",)))
        watch.starts("tp 2")
    shown = capsys.readouterr().out
    assert "now dp_shard 2" in shown and "1 of 2 done, about " in shown and "refused: [a rule]" in shown


def test_off_a_terminal_each_layout_is_a_line_and_the_certificate_ends_them(capsys: pytest.CaptureFixture[str]) -> None:
    good = Verdict(dict.fromkeys(("loss", "gradient", "norm", "clip", "start", "weight"), 1e-15), {}, {"a.0.w": 1e-15}, (), 5000)
    rows = [
        Row(layout_of({"dp_shard": 2}), "fp64", verdict=good),
        Row(layout_of({"tp": 3}), "fp64", refused=("layout.tp=3: must divide the 4 attention heads; nearest: 4",)),
        Row(layout_of({"pp": 2}), "fp64", broken="rank 1 died without a word"),
    ]
    with growing(3) as watch:
        for row in rows:
            watch.starts(row.layout.name)
            watch.add(row)
    lines = capsys.readouterr().out.splitlines()
    assert "equal" in lines[0] and "refused: layout.tp=3" in lines[1] and "broken: rank 1" in lines[2]
    fault = {"name": "own norm", "what": "each rank clips alone", "caught": False}
    told = certificate(
        rows, what="tiny", guards=["dead"], faults=[fault], files=[Path("a.json")], config="tiny.yaml", holds=False
    )
    text = "\n".join(told)
    assert "agree to 15 digits" in text and "1 of 3 layouts refused by a rule" in text and "BROKEN: pp 2" in text
    assert "0 of 1 planted faults were caught" in text and "NOT CAUGHT: own norm" in text and "guard: dead" in text
    assert told[-1].endswith("distllm verify tiny.yaml --layouts pp=2")


def test_the_command_to_type_next_keeps_how_it_was_asked() -> None:
    def last(rows: list[Row], options: str) -> str:
        told = certificate(rows, what="", guards=["none"], faults=[], files=[], config="t.yaml", holds=False, options=options)
        return told[-1].removeprefix("next    distllm verify t.yaml ")

    (deepspeed,) = [engine for engine in engines_of(["deepspeed"]) if engine.zero_stage == 2]
    refused = [Row(layout_of({"cp": 2}), "fp32", deepspeed, refused=("layout.cp=2: no",))]
    asked = words_of(engines="deepspeed", precision="fp32,bf16", steps=3, device="cpu", timeout_s=300.0, trust=True)
    assert last(refused, asked) == "--ranks 2 --engines deepspeed --precision fp32,bf16 --trust"
    wrong = [Row(layout_of({"dp_shard": 2}), "fp32", deepspeed, broken="rank 1 died")]
    assert last(wrong, asked) == "--layouts dp_shard=2 --engines deepspeed --precision fp32,bf16 --trust"
    usual = words_of(engines=None, precision="fp64", steps=3, device="cpu", timeout_s=300.0, trust=False)
    assert usual == "" and last(refused, usual) == "--ranks 2"
    assert last(wrong, usual) == "--layouts dp_shard=2 --engines deepspeed"
