"""What counts as slower than before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distllm.bench.compare import read_record, regressions, remarks
from distllm.config.errors import DataError

HARDWARE = {"device": "CPU", "cores": 2, "gpus": 0, "machine": "x"}
ENVIRONMENT = {"hardware": HARDWARE, "versions": {"torch": "1"}, "config_digest": "d"}


def record(name: str = "a", *, median: float = 1.0, error: float = 0.0, memory: int = 10**9) -> dict[str, Any]:
    figures = {"time": {"median": median, "error": error}, "memory": memory}
    return {"cells": [{"name": name, "status": "measured", "why": "", "figures": figures}]} | ENVIRONMENT


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({}, {"median": 1.04}, []),  # below a twentieth
        ({}, {"median": 1.2}, ["a: a step takes 1200.00 ms, and took 1000.00 ms: +20.0 %, noise 0.0 %"]),
        ({"error": 0.05}, {"median": 1.2, "error": 0.05}, []),  # three errors of the difference are 21 %
        ({"error": 0.05}, {"median": 1.3, "error": 0.05}, ["a: a step takes 1300.00 ms"]),
        ({}, {"median": 0.5}, []),
        ({}, {"memory": 12 * 10**8}, ["a: takes 1,200 MB, and took 1,000 MB"]),
        ({"memory": 10**6}, {"memory": 2 * 10**6}, []),  # a megabyte is noise
        ({}, {"name": "b"}, ["no cell is in both records: nothing was compared"]),
    ],
)
def test_only_what_exceeds_the_noise_is_a_regression(old: dict[str, Any], new: dict[str, Any], found: list[str]) -> None:
    lines = list(regressions(record(**old), record(**new)))
    assert len(lines) == len(found) and all(line.startswith(start) for line, start in zip(lines, found, strict=True)), lines


def test_a_cell_that_no_longer_runs_is_one() -> None:
    gone = record()
    gone["cells"][0] |= {"figures": None, "status": "out of memory", "why": "tried to allocate"}
    assert list(regressions(record(), gone)) == ["a: was measured, and is out of memory now: tried to allocate"]
    assert list(regressions(gone, record())) == []


def test_other_hardware_is_remarked() -> None:
    other = record() | {"hardware": HARDWARE | {"cores": 4}, "config_digest": "e"}
    assert list(remarks(record(), other)) == ["cores was 2, and is 4", "the config is another one"]
    assert list(remarks(record(), record())) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": [{"name": "a"}]}', json.dumps(record(median=0.0))])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"is no record of distllm bench"):
        read_record(path)
