"""The whole command: what it shows, writes and returns."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm import launch
from distllm.bench import measure as measuring
from distllm.bench.cells import Cell
from distllm.bench.rows import BROKEN, MEASURED, REFUSED, TOO_LARGE, Row, failed
from distllm.bench.table import growing
from distllm.cli import run
from distllm.config.schema import Config
from distllm.engine.native import NativeEngine
from distllm.launch.reports import read_reports
from distllm.rank_facts import node_name
from distllm.verify.ranks import Broken
from tests.runs import tiny_config

SHORT = ["--steps", "2", "--warmup", "1", "--device", "cpu"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small matrix product as the peak: its rate is of no interest here."""
    real = measuring.matrix_rate
    monkeypatch.setattr(measuring, "matrix_rate", lambda device, dtype, world: real(device, dtype, world, size=64))


def bench(folder: Path, *words: str) -> int:
    return run(["bench", str(folder / "tiny.yaml"), *words, *SHORT, "--out", str(folder / "out")])


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    return {cell["name"]: cell for cell in json.loads((folder / "out" / "bench.json").read_text())["cells"]}


def test_two_cells_are_measured_and_a_third_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config(tmp_path)
    assert bench(tmp_path, "--grid", "layout.dp_replicate=1,2 layout.dp_shard=1", "--grid", "layout.tp=3") == 0
    printed = capsys.readouterr().out
    one, two, third = cells(tmp_path).values()
    assert (one["status"], two["status"], third["status"]) == (MEASURED, MEASURED, REFUSED)
    assert one["layout"] == {} and two["layout"] == {"dp_replicate": 2} and "tp" in third["why"]
    for cell in (one, two):
        figures = cell["figures"]
        assert figures["tokens_per_s"] == pytest.approx(8 * 32 / figures["time"]["median"])  # global batch x tokens
        assert len(figures["step_s"]) == 2 and figures["memory"] > 0 and figures["cpu_s_per_token"] > 0
        assert set(figures["mfu"]) == {"palm", "nanogpt", "torchtitan", "narayanan"} and figures["hfu"] == figures["mfu"]["palm"]
        assert figures["peak_name"] == "matrix products of the same run" and figures["peak"] == figures["matrix_rate"] > 0
    assert one["figures"]["sent"] == 0 and one["scaling"] is None
    # DDP sums every gradient once, and a ring of two sends each byte once; the other 16 are the loss and its count.
    gradients = 4 * (257 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32)
    assert two["figures"]["sent"] == gradients + 16
    assert two["scaling"]["kind"] == "strong" and two["scaling"]["base"] == 0 and two["figures"]["devices"] == 2
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert len(record["config_digest"]) == 64 and record["versions"]["torch"] and record["hardware"]["cores"]
    assert record["hardware"]["job_nodes"] is None  # no job
    lines = list(csv.DictReader((tmp_path / "out" / "bench.csv").read_text().splitlines()))
    assert [line["status"] for line in lines] == [MEASURED, MEASURED, REFUSED] and float(lines[1]["efficiency"]) > 0
    for name in ("scaling.png", "memory.png"):
        assert (tmp_path / "out" / name).read_bytes()[:8] == PNG
    assert "2 measured, 1 refused" in printed and "MFU      palm" in printed and "refused: " in printed


def test_tokens_that_were_made_for_a_bench_go_with_it(tmp_path: Path) -> None:
    config, own = tiny_config(tmp_path, prepared=False), tmp_path / "out" / "tokens" / "of.mine"
    own.parent.mkdir(parents=True)
    own.write_text("stays")
    assert bench(tmp_path, "--grid", "layout.dp_replicate=1") == 0
    assert {cell["status"] for cell in cells(tmp_path).values()} == {MEASURED}
    assert {file.suffix for file in (tmp_path / "out").iterdir() if file != own.parent} == {".json", ".csv", ".png"}
    assert own.read_text() == "stays"  # the folder may hold what is not the bench's
    assert not Path(config.data.store).exists()  # they are of a part of the text, and no store of the run's


def test_out_of_memory_is_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config(tmp_path)
    real = NativeEngine.train_step

    def too_large(self: NativeEngine, micro: Any, *, samples: range, noise: bool = False) -> Any:
        if micro[0].inputs["input_ids"].shape[0] == 4 and torch.distributed.get_rank() == 1:  # the other hangs in a collective
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
        return real(self, micro, samples=samples, noise=noise)

    monkeypatch.setattr(NativeEngine, "train_step", too_large)
    assert bench(tmp_path, "--grid", "train.micro_batch=4,2 layout.dp_shard=2") == 0
    large, small = cells(tmp_path).values()
    assert large["status"] == TOO_LARGE and large["why"] == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert large["figures"] is None and small["status"] == MEASURED
    assert "out of memory: CUDA out of memory" in capsys.readouterr().out


def test_a_model_that_cannot_fit_is_refused_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config(tmp_path)
    monkeypatch.setattr("distllm.train.build.memory_of", lambda device: 1000)
    assert bench(tmp_path, "--grid", "ranks=1") == 0
    (cell,) = cells(tmp_path).values()
    assert cell["status"] == REFUSED and cell["why"].startswith("model: ")


def test_without_deepspeed_its_cells_are_rows_that_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config(tmp_path)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert bench(tmp_path, "--grid", "engine.name=native,deepspeed ranks=1") == 0
    native, zero = cells(tmp_path).values()
    assert native["status"] == MEASURED and zero["status"] == REFUSED
    assert zero["why"].startswith("engine.name=deepspeed: needs deepspeed; pip install 'distllm[deepspeed]'")


def test_how_a_cell_failed_is_told() -> None:
    cell = Cell((), Config(), 2)
    assert failed(cell, Broken("a rule", ("a rule", "another"))) == Row(cell, REFUSED, "a rule")
    assert failed(cell, Broken("out of memory: x")) == Row(cell, TOO_LARGE, "x")
    died = failed(cell, Broken("rank 1 died without a word"))
    assert died.status == BROKEN and died.why == "rank 1 died without a word, often because memory ran out"
    assert failed(cell, Broken("KeyError: 'x'")) == Row(cell, BROKEN, "KeyError: 'x'")


def test_random_tokens_need_no_data_and_compare_ends_with_eleven(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config(tmp_path, prepared=False)
    words = ("--grid", "ranks=1", "--data", "synthetic")
    assert bench(tmp_path, *words) == 0 and not (tmp_path / "store").exists()
    old = tmp_path / "old.json"
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    record["cells"][0]["figures"]["time"] |= {"median": 1e9, "error": 0.0}
    record["cells"][0]["figures"]["memory"] = 1 << 40
    old.write_text(json.dumps(record))
    assert bench(tmp_path, *words, "--compare", str(old)) == 0
    assert f"no worse than {old}" in capsys.readouterr().out
    record["cells"][0]["figures"]["memory"] = -(1 << 40)
    record["versions"]["torch"] = "0.1"
    old.write_text(json.dumps(record))
    monkeypatch.setenv("DISTLLM_LAUNCH", str(tmp_path / "launch"))
    assert bench(tmp_path, *words, "--compare", str(old)) == 11
    (report,) = read_reports(tmp_path / "launch")  # what `distllm launch` tells at the end
    assert report.code == 11
    assert report.lines == (f"--compare={old}: something became slower, see the lines that begin with SLOWER",)
    printed = capsys.readouterr().out
    assert "SLOWER   ranks=1: takes " in printed and f"torch was 0.1, and is {torch.__version__}" in printed


def test_random_tokens_are_for_the_next_token_alone(tmp_path: Path) -> None:
    tiny_config(tmp_path, prepared=False)
    assert bench(tmp_path, "--data", "synthetic", "--grid", "task.kind=masked_lm model.type=bert model.sizes={}") == 0
    (cell,) = cells(tmp_path).values()
    assert cell["status"] == REFUSED and cell["why"].startswith("--data=synthetic: random tokens are for task.kind=causal_lm")


def test_a_table_grows_on_a_terminal_and_tells_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    cell = Cell((("layout.tp", "2"),), Config(), 2)
    with growing(2) as watch:
        watch.starts(cell.name)
        watch.add(Row(cell, REFUSED, "[a rule]"))
        watch.starts("layout.pp=2")
    shown = capsys.readouterr().out
    assert "now layout.tp=2" in shown and "1 of 2 done, about " in shown and "refused: [a rule]" in shown


def test_inside_a_job_its_ranks_run_the_cells_and_outlive_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks of a launcher: cells of one and of both, one too large for the job, two whose model does not fit."""
    tiny_config(tmp_path)
    grids = ("model.sizes.num_attention_heads=5 ranks=2", "ranks=1,2,4", "layout.pp=2 layout.pp_split=[5,5]")
    argv = ["bench", str(tmp_path / "tiny.yaml"), *(word for grid in grids for word in ("--grid", grid))]
    assert launch.local_ranks([*argv, *SHORT, "--out", str(tmp_path / "out")], 2) == 0
    printed = capfd.readouterr()
    found = cells(tmp_path)
    assert [cell["status"] for cell in found.values()] == [REFUSED, MEASURED, MEASURED, REFUSED, REFUSED], printed
    assert found["ranks=4"]["why"] == "ranks=4: this job has 2 ranks; nearest: 2"
    assert printed.out.count("ranks=1 ") == 1  # the first rank alone speaks
    hardware = json.loads((tmp_path / "out" / "bench.json").read_text())["hardware"]
    assert hardware["job_ranks"] == 2 and hardware["job_nodes"] == {node_name(): 2}
