"""The command line of a bench, and the cells that come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distllm.bench.asked import Options, options_of, parse_grid
from distllm.bench.cells import Room, cells_of
from distllm.config.errors import ConfigError
from tests.runs import tiny_config

CPU = Room(gpus=0, cores=2)


def asked(*grid: str, **changed: Any) -> Options:
    values = {"steps": 2, "warmup": 1, "data": "config", "against": "", "rounds": 1, "compare": None, "timeout_s": 1.0}
    return options_of(grid=grid, **(values | changed))


def test_a_grid_is_every_combination_and_grids_follow_one_another() -> None:
    points = asked("layout.tp=1,2 train.micro_batch=4,8", "ranks=2", "ranks=2").points
    assert points == [
        {"layout.tp": "1", "train.micro_batch": "4"}, {"layout.tp": "1", "train.micro_batch": "8"},
        {"layout.tp": "2", "train.micro_batch": "4"}, {"layout.tp": "2", "train.micro_batch": "8"}, {"ranks": "2"},
    ]  # fmt: skip


def test_commas_and_spaces_inside_brackets_divide_nothing() -> None:
    assert parse_grid("activation.keep=[matmul, attention],[] activation.mode=selective") == (
        {"activation.keep": ["[matmul, attention]", "[]"], "activation.mode": ["selective"]}, [],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"grid": ["layout.tq=2"]}, "--grid=layout.tq=2: unknown key; nearest: layout.tp"),
        ({"grid": ["layout.tp"]}, "--grid=layout.tp: must look like key=value,value; nearest: layout.dp_shard=1,2"),
        ({"grid": ["ranks=0,2"]}, "--grid=ranks=0,2: must be numbers from 1 to 4,096; nearest: ranks=1,2"),
        ({"grid": [" "]}, "names no key; nearest: layout.dp_shard=1,2"),
        ({"grid": ["seed=" + ",".join(map(str, range(300)))]}, "--grid: 300 cells; at most 256 are run; nearest: fewer values"),
        ({"data": "random"}, "--data=random: must be config or synthetic; nearest: synthetic"),
        ({"against": "bare,trainer"}, "--against=trainer: must be of bare, hf-trainer, accelerate, each also with +host, "),
        ({"compare": Path("nowhere.json")}, "--compare=nowhere.json: no such file; nearest: the bench.json of an earlier run"),
    ],
)
def test_bad_input_is_one_line(changed: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as told:
        asked(*changed.pop("grid", []), **changed)
    assert len(told.value.problems) == 1 and line in told.value.problems[0]


def test_cells_are_configs_or_the_rule_that_refuses_them(tmp_path: Path) -> None:
    tiny_config(tmp_path, prepared=False)
    points = asked("layout.dp_shard=1,2 train.micro_batch=2,3", "layout.tp=3", "ranks=64").points
    cells = cells_of(tmp_path / "tiny.yaml", ["optim.lr=0.5"], points, CPU)
    assert [cell.ranks for cell in cells] == [1, 1, 2, 2, 3, 64]
    assert [bool(cell.refused) for cell in cells] == [False, True, False, True, True, True]
    assert cells[2].name == "layout.dp_shard=2 train.micro_batch=2"
    assert cells[2].config.layout.dp_shard == 2 and cells[2].config.optim.lr == 0.5 and cells[2].config.device == "cpu"
    assert cells[1].refused[0].startswith("train.global_batch=8: must be a multiple of micro_batch 3")
    assert "ranks=64: this machine has room for 8 ranks; nearest: 8" in cells[5].refused


def test_values_that_cannot_be_are_told_all_at_once(tmp_path: Path) -> None:
    tiny_config(tmp_path, prepared=False)
    with pytest.raises(ConfigError) as told:
        cells_of(tmp_path / "tiny.yaml", [], asked("layout.tp=x optim.lr=-1").points + asked("layout.pp=0").points, CPU)
    assert len(told.value.problems) == 3, told.value.problems


def test_what_a_bench_cannot_time_is_refused(tmp_path: Path) -> None:
    tiny_config(tmp_path, prepared=False)
    (cell,) = cells_of(tmp_path / "tiny.yaml", [], [{"distill.teacher": "runs/other"}], CPU)
    assert any(rule.startswith("distill.teacher=runs/other: bench trains without a teacher") for rule in cell.refused)


@pytest.mark.parametrize(
    ("room", "names"),
    [
        (CPU, ["as configured", "activation.mode=full", "layout.dp_shard=1 layout.dp_replicate=2", "layout.dp_shard=2"]),
        (
            Room(gpus=2, cores=8),
            [
                "as configured", "activation.mode=full", "precision.compute=bf16", "precision.compute=bf16 train.compile=true",
                "layout.dp_shard=1", "layout.dp_shard=1 layout.dp_replicate=2",
            ],
        ),
    ],
)  # fmt: skip
def test_without_a_grid_a_few_cells_suit_the_machine(room: Room, names: list[str], tmp_path: Path) -> None:
    tiny_config(tmp_path, prepared=False)
    cells = cells_of(tmp_path / "tiny.yaml", [], [], room)
    assert [cell.name for cell in cells] == names
    assert not any(cell.refused for cell in cells)
