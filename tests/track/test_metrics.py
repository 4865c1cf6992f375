import json
import math
from pathlib import Path

import pytest

from distllm.config.errors import DistllmError
from distllm.track.metrics import MetricsFile, read_metrics


def strict(line: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_line_is_on_the_disk_when_append_returns_and_strict_parsers_read_it(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"loss": math.nan, "high": math.inf, "low": -math.inf, "mfu": None, "tokens": 2**40, "lr": 1e-3})
    lines = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": "nan", "high": "inf", "low": "-inf", "tokens": 2**40, "lr": 1e-3}]
    (back,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(back["loss"]) and back["high"] == math.inf and back["low"] == -math.inf
    file.close()


def test_rewind_drops_later_lines_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (10, 20, 20, 30, 40):
        file.append(step, {"loss": float(step)})
    assert file.rewind(20) == 2
    file.append(30, {"loss": 3.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(10, 10), (20, 20), (20, 20), (30, 3)]
    assert file.rewind(100) == 0 and file.rewind(0) == 4
    file.append(1, {"loss": 1.0})
    file.close()
    assert [line["step"] for line in read_metrics(path)] == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(5):
        file.append(step, {})
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("distllm.track.metrics.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            file.rewind(2)
    assert path.read_bytes() == before
    file.append(5, {})
    file.close()
    assert len(read_metrics(path)) == 6


@pytest.mark.parametrize("tail", [b'{"step": 30, "lo', b'{"step": 30}', b"x" * 10_000, b"\0\0\0"])
def test_a_torn_last_line_is_dropped_on_opening(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n{"step": 20}\n' + tail)
    assert [line["step"] for line in read_metrics(path)] == [10, 20]  # a reader does not trip over it either
    file = MetricsFile(path)
    file.append(30, {})
    file.close()
    assert [line["step"] for line in read_metrics(path)] == [10, 20, 30]


def test_a_file_that_is_only_a_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"st')
    MetricsFile(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", [b"{broken", b"[1]", b'{"loss": 1.0}', b'{"step": "7"}', b"\xff\xfe", b'{"step": true}'])
def test_a_damaged_line_is_named_by_the_reader_and_dropped_by_a_resume(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n' + line + b'\n{"step": 20}\n')
    with pytest.raises(DistllmError, match=r"metrics\.jsonl:2: not a metrics line") as told:
        read_metrics(path)
    assert "\n" not in str(told.value)
    file = MetricsFile(path)
    assert file.rewind(20) == 1
    file.close()
    assert [entry["step"] for entry in read_metrics(path)] == [10, 20]


def test_a_missing_and_an_empty_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DistllmError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DistllmError, match="is empty"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_short_write_is_an_error_not_a_silent_half_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.close()
    file._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115 - MetricsFile closes it
    with pytest.raises(OSError, match="No space"):
        file.append(1, {"loss": 1.0})
    file.close()
