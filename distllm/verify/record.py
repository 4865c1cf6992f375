"""What is left of a verification: a JSON record, and a picture of the error by layer of the worst layout."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distllm import __version__
from distllm.config.load import digest
from distllm.config.machine import cores
from distllm.config.schema import Config
from distllm.verify.rows import Row

RECORD, PICTURE = "verify.json", "errors.png"
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"  # of Okabe and Ito


def write_record(
    folder: Path, config: Config, rows: Sequence[Row], *, guards: Sequence[str], faults: Sequence[Mapping[str, Any]], holds: bool
) -> Path:
    """Write `verify.json`.

    Args:
        folder: where.
        config: the user's.
        rows: a layout each.
        guards: what the guards found.
        faults: planted faults, and whether each was caught.
        holds: the verdict on everything.
    """
    import numpy
    import torch
    import transformers

    versions = {
        "distllm": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "numpy": numpy.__version__,
    }  # fmt: skip
    hardware = {
        "machine": platform.machine(), "cores": cores(), "memory_bytes": _memory(), "gpus": torch.cuda.device_count(),
    }  # fmt: skip
    record = {
        "holds": holds,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config.name,
        "config_digest": digest(config),
        "versions": versions,
        "hardware": hardware,
        "bounds": {row.kind: vars(row.verdict.bounds) for row in rows if row.verdict is not None},
        "guards": list(guards),
        "layouts": [row.as_json() for row in rows],
        "planted_faults": list(faults),
    }
    path = folder / RECORD
    path.write_text(json.dumps(record, indent=1, allow_nan=False, default=_plain) + "\n", encoding="utf-8")
    return path


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _plain(value: Any) -> Any:
    return float(value)


def draw(folder: Path, row: Row) -> Path:
    """Draw the error of every tensor of one layout by layer, and write `errors.png`.

    Args:
        folder: where.
        row: a layout that was judged.
    """
    verdict = row.verdict
    assert verdict is not None
    places = [(layer_of(name), error) for name, error in verdict.by_tensor.items()]
    last = max((layer for layer, _ in places if layer is not None), default=-1)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    least = 1e-18
    finite = [error for _, error in places if math.isfinite(error)]
    most = max([*finite, verdict.bounds.gradient]) * 10
    shown = [(last + 1 if layer is None else layer, min(max(error, least), most)) for layer, error in places]
    axes.scatter([x for x, _ in shown], [y for _, y in shown], s=18, color=BLUE, label="a tensor")
    worst = {x: max(y for other, y in shown if other == x) for x, _ in shown}
    axes.plot(sorted(worst), [worst[x] for x in sorted(worst)], color=GREY, linewidth=1, label="worst of a layer")
    axes.axhline(verdict.bounds.gradient, color=VERMILION, linestyle="--", linewidth=1, label="bound")
    axes.set_yscale("log")
    axes.set_ylim(least / 2, most * 2)
    axes.set_xticks(sorted(worst), [str(x) if x <= last else "rest" for x in sorted(worst)])
    axes.set_xlabel("layer (rest: embedding, last norm, head)")
    axes.set_ylabel("relative error of gradients and weights")
    axes.set_title(f"{row.layout.name}, {row.kind}, against one process")
    axes.legend(loc="upper right", fontsize=8)
    path = folder / PICTURE
    figure.savefig(path, dpi=130)
    return path


def layer_of(name: str) -> int | None:
    """The number of the layer in a parameter's name; None outside the layers."""
    found = re.search(r"\.(\d+)\.", f".{name}")
    return int(found.group(1)) if found else None
