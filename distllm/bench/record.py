"""What is left of a bench: a JSON record with everything, and a CSV with a line for each cell."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distllm import __version__
from distllm.bench.asked import Options
from distllm.bench.cells import Room
from distllm.bench.rows import Row
from distllm.config.load import digest
from distllm.config.schema import Config

RECORD, TABLE = "bench.json", "bench.csv"


def record_of(
    config: Config, rows: Sequence[Row], *, sides: Sequence[Mapping[str, Any]], options: Options, room: Room,
    nodes: Mapping[str, int] | None, command: str,
) -> dict[str, Any]:  # fmt: skip
    """Everything that was measured, and where.

    Args:
        config: the user's, before the grid.
        rows: a cell each.
        sides: what `against.summary` gave for each number of ranks.
        options: what was asked for.
        room: what it ran on.
        nodes: of a job, the ranks of each node by its name.
        command: what was typed.
    """
    import numpy
    import torch
    import transformers

    device = next((row.figures.device for row in rows if row.figures is not None), "")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "config": config.name,
        "config_digest": digest(config),
        "versions": {
            "distllm": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "transformers": transformers.__version__, "numpy": numpy.__version__,
        },
        "hardware": {
            "machine": platform.machine(), "cores": room.cores, "gpus": room.gpus, "device": device, "job_ranks": room.ranks,
            "job_nodes": nodes,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load": list(os.getloadavg()),
        },
        "steps": options.steps, "warmup": options.warmup, "data": options.data,
        "cells": [row.as_json() for row in rows],
        "against": [dict(one) for one in sides],
    }  # fmt: skip


def write_json(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write `bench.json`."""
    path = folder / RECORD
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def write_csv(folder: Path, rows: Sequence[Row]) -> Path:
    """Write `bench.csv`: a line for each cell, times in seconds, sizes in bytes, rates in tokens or FLOPs a second."""
    path = folder / TABLE
    lines = [flat(row) for row in rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)
    return path


def flat(row: Row) -> dict[str, Any]:
    """A row as one line; without figures their places stay empty."""
    told = row.as_json()
    line = {key: value for key, value in told.items() if not isinstance(value, dict | None)}
    line["layout"] = " x ".join(f"{axis} {ranks}" for axis, ranks in told["layout"].items())
    figures = row.figures
    if figures is not None:
        line |= {
            "step_s": figures.time.median, "step_s_q1": figures.time.low, "step_s_q3": figures.time.high,
            "tokens_per_s": figures.tokens_per_s, "cpu_s_per_token": figures.cpu_s_per_token,
            "data_wait_share": figures.wait_share, "memory_bytes": figures.memory, "sent_bytes": figures.sent,
            "peak_flops": figures.peak, "peak": figures.peak_name, "matrix_flops": figures.matrix_rate,
            "hfu": figures.hfu, "devices": figures.devices, "device": figures.device,
        } | {f"mfu_{name}": share for name, share in figures.mfu.items()}  # fmt: skip
    if row.scaling is not None:
        line |= {"scaling": row.scaling.kind, "efficiency": row.scaling.efficiency}
    return line
