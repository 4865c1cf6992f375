"""`metrics.jsonl`: one JSON object a line, each with its step, on the disk before the next step is taken.

It is the source of truth: an online tracker buffers, and loses its last lines when a run is killed.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distllm.config.errors import DistllmError

METRICS = "metrics.jsonl"
"""The file's name in a run folder."""


class MetricsFile:
    """The metrics file of a run, open for appending; a torn last line of a killed run is dropped first."""

    def __init__(self, path: Path) -> None:
        """Open `path`, or create it.

        Raises:
            OSError: the folder cannot be written.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        # Unbuffered: one write a line, so a line of a killed run is there whole, or is the torn last one.
        self._file = path.open("ab", buffering=0)

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line.

        Args:
            step: optimizer steps taken.
            values: plain numbers and strings by name. None is left out. JSON has no NaN and no infinity, so they are
                written as the strings "nan", "inf" and "-inf", which a strict parser reads.

        Raises:
            OSError: the disk is full.
        """
        plain = {name: _plain(value) for name, value in values.items() if value is not None}
        line = json.dumps({"step": int(step), **plain}, allow_nan=False, ensure_ascii=False) + "\n"
        data = line.encode("utf-8")
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def rewind(self, step: int) -> int:
        """Drop every line after `step`, all at once or not at all, so that a resumed run writes none twice.

        Lines that are not JSON are dropped too: a resume must not fail because of a damaged log.

        Args:
            step: the step of the checkpoint that the run continues from.

        Returns:
            How many lines were dropped.
        """
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        dropped = 0
        with self._path.open("rb") as source, temporary.open("wb") as kept:
            for line in source:
                if _step_of(line) > step:
                    dropped += 1
                else:
                    kept.write(line)
            kept.flush()
            os.fsync(kept.fileno())
        if dropped == 0:
            temporary.unlink()
            return 0
        os.replace(temporary, self._path)
        self._file.close()
        self._file = self._path.open("ab", buffering=0)
        return dropped

    def close(self) -> None:
        """Close the file; further lines are an error."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file, with its non-finite numbers as floats again.

    A last line without its end is left out: the run is writing it, or was killed while it did.

    Args:
        path: the file.

    Returns:
        The lines in order; each has an integer "step".

    Raises:
        DistllmError: the file is missing or empty, or a line is not a metrics line: names the file and the line.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise DistllmError(f"{path}: there is no such file; give the folder of a run that has begun to train") from None
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        raise DistllmError(f"{path}: the file is empty; the run has not logged a step yet")
    return list(_parse(whole, path))


def _parse(lines: list[bytes], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if _step_of(line) == math.inf:
            raise DistllmError(
                f'{path}:{number}: not a metrics line (a JSON object with an integer "step"); delete it and repeat'
            )
        yield {name: _number(value) for name, value in json.loads(line).items()}


def _step_of(line: bytes) -> float:
    """The step of a line; infinity when it is no metrics line."""
    try:
        entry = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return math.inf
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, str)):
        return value
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:  # look for the last newline, a block at a time, from the end
            start = max(0, end - 4096)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
