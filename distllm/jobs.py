"""The runs of a folder: state, step and last loss, from small files alone. No torch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distllm.config.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED, ConfigError

if TYPE_CHECKING:
    from distllm.comm import World

STATE, JOB = "state.json", "job.json"
_TAIL = 65_536  # bytes of metrics.jsonl that surely hold its last steps


@dataclass(frozen=True)
class RunLine:
    """One run, as it is listed."""

    name: str
    state: str
    step: int | None
    steps: int | None
    loss: float | None
    age_s: float | None
    """Seconds since its last metric."""
    where: str


def mark(folder: Path, what: str, *, world: World, code: int = 0) -> None:
    """Write down that a run is running, or how it ended; rank 0 does, in a folder that holds the run.

    Args:
        folder: the run folder.
        what: running or ended.
        world: this rank's facts.
        code: the exit code of the end.
    """
    if not world.is_main or not (folder / "config.yaml").exists():
        return
    value = {
        "state": what, "code": code, "host": socket.gethostname(), "pid": os.getpid(), "ranks": world.size,
        "job": os.environ.get("SLURM_JOB_ID"), "at": time.time(),
    }  # fmt: skip
    temporary = folder / f".{STATE}.tmp"
    try:
        temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
        os.replace(temporary, folder / STATE)
    except OSError:
        return  # a full disk has been told already


def show(folder: Path) -> int:
    """Print a line for each run of a folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError([f"{folder}: no such folder of runs; nearest: distllm jobs runs"])
    lines = runs_of(folder)
    if not lines:
        print(f"no runs in {folder}")
        return EXIT_OK
    rows = [("run", "state", "step", "loss", "last sign", "where"), *[_row(line) for line in lines]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return EXIT_OK


def runs_of(folder: Path) -> list[RunLine]:
    """The runs of a folder by name, those that wait in SLURM's queue among them."""
    names = {path.parent.name for path in folder.glob("*/config.yaml")}
    names |= {path.parent.name for path in folder.glob(f".launch/*/{JOB}")}
    queue = _queue()
    return [_line(folder, name, queue) for name in sorted(names)]


def _line(folder: Path, name: str, queue: dict[str, str]) -> RunLine:
    run = folder / name
    state, queued = _json(run / STATE), _json(folder / ".launch" / name / JOB)
    last, age = _last(run / "metrics.jsonl")
    loss = next((m["loss"] for m in reversed(last) if isinstance(m.get("loss"), int | float)), None)
    step = max((m["step"] for m in last), default=None)
    job = state.get("job") or queued.get("job")
    where = " ".join(filter(None, [state.get("host", ""), f"job {job}" if job else ""]))
    return RunLine(name, _state(run, state, queued, queue), step, _steps(run), loss, age, where)


def _state(run: Path, state: dict[str, Any], queued: dict[str, Any], queue: dict[str, str]) -> str:
    """done, running, queued, stopped, failed, killed, or new; SLURM is asked about jobs of its own."""
    # A job that was submitted again by its own script has another number than the one that was given out first.
    in_queue = next((queue[job] for job in (str(queued.get("job")), str(state.get("job"))) if job in queue), "")
    if in_queue in ("PENDING", "CONFIGURING", "REQUEUED", "SPECIAL_EXIT"):
        return "queued"
    if not state:
        return "queued" if in_queue else "new"
    if state.get("state") == "ended":
        return _ended(run, int(state.get("code", 0)))
    if state.get("host") == socket.gethostname() and not in_queue:
        return "running" if _alive(int(state.get("pid", 0))) else "killed"
    if state.get("job") and queue and not in_queue:
        return "killed"
    return "running"


def _ended(run: Path, code: int) -> str:
    if code == EXIT_OK:
        return "done"
    return "stopped" if code in (EXIT_STOPPED, EXIT_INTERRUPTED) else f"failed ({code})"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def _queue() -> dict[str, str]:
    """The state of each of this user's jobs, by number; of an array by ARRAY_INDEX too. Empty where there is no SLURM."""
    if shutil.which("squeue") is None:
        return {}
    try:
        done = subprocess.run(
            ["squeue", "-h", "-r", "--me", "-o", "%A %F_%K %T"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, str] = {}
    for row in (line.split() for line in done.stdout.splitlines()):
        if len(row) == 3:
            number, element, state = row
            found[element] = state
            if element.endswith("_N/A") or state != "PENDING":  # those of an array that wait all have the array's number
                found[number] = state
    return found


def _last(file: Path) -> tuple[list[dict[str, Any]], float | None]:
    """The last lines of a metrics file, and how old it is."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - _TAIL))
            lines = opened.read().splitlines(keepends=True)
        age = time.time() - file.stat().st_mtime
    except OSError:
        return [], None
    found = []
    for line in lines[1:] if size > _TAIL else lines:
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found, age


def _steps(run: Path) -> int | None:
    """`train.steps` of the saved config, without reading it as a config."""
    from distllm.config import yaml12

    try:
        value = yaml12.read((run / "config.yaml").read_text(encoding="utf-8"), where=str(run))
        return int(value["train"]["steps"])
    except Exception:  # a run whose config is torn is listed all the same
        return None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _row(line: RunLine) -> tuple[str, str, str, str, str, str]:
    steps = "-" if line.step is None else f"{line.step}" + (f"/{line.steps}" if line.steps else "")
    loss = "-" if line.loss is None else f"{line.loss:.4f}"
    return line.name, line.state, steps, loss, _ago(line.age_s), line.where


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
