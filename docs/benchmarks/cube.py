"""The quickstart on 2 x 2 x 2 ranks (shard x tensor x pipeline), saved, continued elsewhere, exported: against one process.

    python docs/benchmarks/cube.py --work /tmp/cube

Runs `distllm train` as a user would: one process, and eight ranks with gloo; the eight ranks' middle checkpoint goes on as four
shards and as one process. Writes cube.json beside this file: commands, the largest difference of training and validation losses
from the run of one process, and the loss of both exported models on the same text, as `distllm eval` tells it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

import distllm

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "train.steps=8", "train.log_every=1", "train.eval_every=4", "train.eval_batches=0", "train.sample_every=0",
    "train.sample_tokens=8", "checkpoint.every=4", "checkpoint.keep=10", "schedule.warmup=2", "data.validation.fraction=0.002",
    "train.threads=1", "precision.compute=fp32", "device=cpu",
)  # fmt: skip


def run(words: list[str]) -> str:
    command = [sys.executable, "-m", "distllm", *words]
    print("distllm", " ".join(words), flush=True)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=one_thread).stdout


def figures(folder: Path) -> dict[str, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {f"{name} {line['step']}": line[name] for line in lines for name in ("loss", "val_loss") if name in line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for runs and tokens")
    work = parser.parse_args().work
    common = ["train", "configs/quickstart.yaml", f"out={work}/runs", f"data.store={work}/store", *SMALL]
    middle = f"resume={work}/runs/cube/checkpoints/step-4"
    runs = {
        "one": ["layout.dp_shard=1"],
        "cube": ["layout.dp_shard=2", "layout.tp=2", "layout.pp=2"],
        "shards": ["layout.dp_shard=4", middle],
        "alone": ["layout.dp_shard=1", middle],
    }
    for name, words in runs.items():
        run([*common, f"name={name}", *words])
    wanted = figures(work / "runs" / "one")
    record: dict[str, object] = {
        "date": str(date.today()), "distllm": distllm.__version__, "torch": torch.__version__, "machine": platform.machine(),
        "cores": os.cpu_count(),
        "commands": {name: f"distllm {' '.join([*common, f'name={name}', *w])}" for name, w in runs.items()},
    }  # fmt: skip
    evaluated = {}
    for name in ("one", "cube"):
        run(["export", f"{work}/runs/{name}", f"{work}/{name}-hf"])
        text = run(["eval", f"{work}/{name}-hf", "--text", "README.md", "--device", "cpu"])
        evaluated[name] = float(re.search(r"loss\s+([0-9.]+)", text).group(1))  # type: ignore[union-attr]
    differences = {}
    for name in ("cube", "shards", "alone"):
        found = figures(work / "runs" / name)
        differences[name] = max(abs(value - wanted[key]) for key, value in found.items() if key in wanted)
    record |= {"losses of one process": wanted, "largest difference": differences, "loss of the export on README.md": evaluated}
    told = json.dumps(record, indent=2).replace(str(work), "WORK")
    (Path(__file__).parent / "cube.json").write_text(told + "\n")
    print(json.dumps({"largest difference": differences, "exports": evaluated}, indent=2))


if __name__ == "__main__":
    main()
