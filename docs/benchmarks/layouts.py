"""Step times of one process, DDP and FSDP2 on two gloo ranks, through the real command line, interleaved.

    python docs/benchmarks/layouts.py --rounds 3

Each round trains the quickstart's model with the same global batch in all layouts, in turn; a figure is the median step
time of a run after its first steps, and a ratio is of two runs of one round. One process has all cores as threads; two
ranks share them. The losses must agree, or the script fails.
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
from datetime import date
from pathlib import Path

import torch

import distllm

ROOT = Path(__file__).resolve().parent.parent.parent
LAYOUTS = {
    "one process": ["layout.dp_shard=1"],
    "DDP, 2 ranks": ["layout.dp_replicate=2", "layout.dp_shard=1"],
    "FSDP2, 2 ranks": ["layout.dp_shard=2"],
    "FSDP2, 2 ranks, kept gathered": ["layout.dp_shard=2", "layout.reshard_after_forward=false"],
}


def run(folder: Path, name: str, axes: list[str], *, steps: int, batch: int) -> tuple[float, list[float]]:
    """Train; returns the median step time in seconds and the losses."""
    ranks = 1 if name == "one process" else 2
    command = [
        sys.executable, "-m", "distllm", "train", str(ROOT / "configs" / "quickstart.yaml"), f"out={folder}",
        f"name={name.replace(' ', '-').replace(',', '')}", f"data.store={folder / 'store'}", "data.validation.fraction=0.002",
        f"train.steps={steps}", f"train.global_batch={batch}", f"train.micro_batch={batch // ranks}", "train.log_every=1",
        "train.eval_every=0", "train.sample_every=0", "train.sample_tokens=0", "checkpoint.every=0", *axes,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    lines = [json.loads(line) for line in (folder / command[6].split("=")[1] / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "loss" in line]
    return statistics.median(r["step_time_s"] for r in rows[5:]), [r["loss"] for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="samples of the global batch")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    worst = 0.0
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            curves = {}
            for name, axes in LAYOUTS.items():
                seconds, curves[name] = run(Path(folder), name, axes, steps=args.steps, batch=args.batch)
                times[name].append(seconds)
                print(f"round {number + 1}/{args.rounds}: {name}: {1000 * seconds:.1f} ms a step", flush=True)
            reference = curves["one process"]
            worst = max(worst, *(abs(a - b) for c in curves.values() for a, b in zip(c[:5], reference[:5], strict=True)))
    assert worst <= 2e-6, f"the layouts' first five losses differ by {worst}"
    ratio = {name: [a / b for a, b in zip(times[name], times["one process"], strict=True)] for name in LAYOUTS}
    fsdp_ddp = [a / b for a, b in zip(times["FSDP2, 2 ranks"], times["DDP, 2 ranks"], strict=True)]
    record = {
        "what": "median step time by layout, interleaved; ratios to one process of the same round",
        "command": " ".join(["python", "docs/benchmarks/layouts.py", *sys.argv[1:]]), "date": date.today().isoformat(),
        "versions": {"distllm": distllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "backend": "gloo"},
        "step_time_s": times, "ratio_to_one_process": ratio, "fsdp_over_ddp": fsdp_ddp,
        "largest_loss_difference_of_five_steps": worst,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, values in ratio.items():
        print(f"{name}: {statistics.median(values):.3f} x one process (min {min(values):.3f}, max {max(values):.3f})")
    print(f"FSDP2 / DDP: {statistics.median(fsdp_ddp):.3f} (min {min(fsdp_ddp):.3f}, max {max(fsdp_ddp):.3f}); "
          f"losses of the first five steps differ by at most {worst:.1e}; record in {args.out}")  # fmt: skip


if __name__ == "__main__":
    main()
