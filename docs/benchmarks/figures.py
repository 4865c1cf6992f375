"""The figures of whole commands: the quickstart, tiny Shakespeare, and how soon the command line answers.

    python docs/benchmarks/figures.py --shakespeare data/tinyshakespeare/input.txt

Writes figures.json: what each run said in its summary.json, its wall time, and the wall times of `--help` and of a config
error (the median of ten, after one to warm the page cache).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

import distllm

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [str(Path(sys.executable).parent / "distllm")]


def timed(words: list[str], *, code: int = 0) -> float:
    """Wall seconds of a command that must end with `code`."""
    begin = time.perf_counter()
    done = subprocess.run([*COMMAND, *words], cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == code, done.stderr
    return time.perf_counter() - begin


def trained(folder: Path, config: str, *overrides: str) -> dict[str, object]:
    """Train a shipped config and return what it said of itself."""
    seconds = timed(["train", f"configs/{config}.yaml", f"out={folder}", f"data.store={folder / 'store'}", *overrides])
    summary = json.loads((folder / config / "summary.json").read_text())
    print(f"{config}: {summary}, {seconds:.1f} s", flush=True)
    return {"wall_s": round(seconds, 2), **summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shakespeare", type=Path, required=True, help="the text of tiny Shakespeare")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    text = f"data.sources.0.path={args.shakespeare.resolve()}"
    answers = {"--help": (["--help"], 0), "config error": (["train", "configs/quickstart.yaml", "train.stesp=1"], 2)}
    record: dict[str, object] = {
        "what": "whole commands", "command": "python docs/benchmarks/figures.py --shakespeare INPUT.TXT",
        "date": date.today().isoformat(),
        "versions": {"distllm": distllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "load_at_start": os.getloadavg()[0]},
    }  # fmt: skip
    for name, (words, code) in answers.items():
        seconds = [timed(words, code=code) for _ in range(11)][1:]
        record[f"{name}_s"] = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
        print(f"{name}: {statistics.median(seconds):.3f} s (min {min(seconds):.3f}, max {max(seconds):.3f})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        record["quickstart"] = trained(Path(folder), "quickstart")
        record["shakespeare_char"] = trained(Path(folder), "shakespeare_char", text)
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
