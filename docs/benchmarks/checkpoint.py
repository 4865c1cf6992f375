"""How long a save keeps the training step waiting, against one bare copy of the same bytes, and against torch's DCP.

    python docs/benchmarks/checkpoint.py [--mib 256] [--rounds 12] [--threads 1] [--out docs/benchmarks/checkpoint.json]

All ways are timed in turns in one run, so that a busy machine slows all alike. The state is that of a small transformer
with AdamW: many tensors of uneven sizes. `step_slowdown` is matrix products during a background write against without.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from distllm.checkpoint.chunk import Chunk
from distllm.checkpoint.manager import CheckpointManager
from distllm.comm import World
from distllm.config.schema import CheckpointConfig

ABOUT: dict[str, Any] = {"facts": {}, "rng": {}, "layout": {}, "config_yaml": "", "config_digest": ""}


def state(mib: int) -> dict[str, torch.Tensor]:
    """fp32 parameters, first and second moments of layers of 4 x [512, 512], [512, 2048] x 2 and two norms."""
    layer = {"q": (512, 512), "k": (512, 512), "v": (512, 512), "o": (512, 512), "up": (2048, 512), "down": (512, 2048)}
    layer |= {"norm1": (512,), "norm2": (512,)}
    result: dict[str, torch.Tensor] = {}
    number = 0
    while sum(t.nbytes for t in result.values()) < mib << 20:
        for kind in ("model", "optim.exp_avg", "optim.exp_avg_sq"):
            result |= {f"{kind}.{number}.{name}": torch.randn(shape) for name, shape in layer.items()}
        number += 1
    return result


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    return {n: round(f(values), digits) for n, f in (("min", min), ("median", statistics.median), ("max", max))}


def steps_in(seconds: float, a: torch.Tensor) -> float:
    """Matrix products a second, for about so long."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ a
        count += 1
    return count / (time.perf_counter() - start)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def manager(folder: Path, *, asynchronous: bool) -> CheckpointManager:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    config = CheckpointConfig(asynchronous=asynchronous, keep=1)
    return CheckpointManager(folder, config=config, world=world, attempt="bench", logger=logging.getLogger("bench"))


def measure(mib: int, rounds: int, root: Path) -> dict[str, Any]:
    values = state(mib)
    size = sum(t.nbytes for t in values.values())
    chunks = {n: Chunk(t, tuple(t.shape), (0,) * t.dim(), True) for n, t in values.items()}
    background, direct = manager(root / "a", asynchronous=True), manager(root / "s", asynchronous=False)
    first = timed(lambda: background.save(0, chunks, **ABOUT))
    background.wait()
    background.reserve(chunks)
    twin = {n: torch.empty_like(t).copy_(t) for n, t in values.items()}
    matrix = torch.randn(512, 512)
    times: dict[str, list[float]] = {
        k: [] for k in ("bare_copy", "blocked", "total", "sync", "dcp_sync", "dcp_async_blocked", "dcp_async_total", "load")
    }
    quiet, busy = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference
        for step in range(1, rounds + 1):
            quiet.append(steps_in(0.3, matrix))
            times["bare_copy"].append(timed(lambda: [twin[n].copy_(t) for n, t in values.items()]))
            start = time.perf_counter()
            background.save(step, chunks, **ABOUT)
            times["blocked"].append(time.perf_counter() - start)
            background.wait()
            times["total"].append(time.perf_counter() - start)
            times["sync"].append(timed(lambda step=step: direct.save(step, chunks, **ABOUT)))
            found = background.newest()
            assert found is not None
            times["load"].append(timed(lambda found=found: background.load(found, chunks, layout={})))
            background.save(step, chunks, **ABOUT)
            busy.append(steps_in(0.3, matrix))
            background.wait()
            shutil.rmtree(root / "d", ignore_errors=True)
            times["dcp_sync"].append(timed(lambda: dcp.save(values, checkpoint_id=root / "d", no_dist=True)))
            shutil.rmtree(root / "d", ignore_errors=True)
            start = time.perf_counter()
            future = dcp.async_save(values, checkpoint_id=root / "d", no_dist=True)
            times["dcp_async_blocked"].append(time.perf_counter() - start)
            future.result()
            times["dcp_async_total"].append(time.perf_counter() - start)
    ratio = [b / c for b, c in zip(times["blocked"], times["bare_copy"], strict=True)]
    return {
        "bytes": size,
        "tensors": len(values),
        "seconds": {name: spread(v) for name, v in times.items()},
        "first_save_blocked_without_reserve_s": round(first, 4),
        "blocked_over_bare_copy": spread(ratio, 3),
        "blocked_over_dcp_async": round(
            statistics.median(times["blocked"]) / statistics.median(times["dcp_async_blocked"]), 3
        ),
        "write_gib_per_s": round(size / statistics.median(times["total"]) / 2**30, 3),
        "step_slowdown": spread([q / b for q, b in zip(quiet, busy, strict=True)], 3),
        "raw": {name: [round(x, 5) for x in v] for name, v in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 1 keeps a busy machine's noise out of the copies")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    root = Path(tempfile.mkdtemp(dir=asked.folder))
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        result = measure(asked.mib, asked.rounds, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python docs/benchmarks/checkpoint.py " + " ".join(sys.argv[1:]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_at_end": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "safetensors")}},
        "note": "both fsync their files; dcp takes no digests, distllm takes the sha256 of every file",
        **result,
    }
    text = json.dumps(record, indent=1)
    if asked.out:
        asked.out.write_text(text + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "raw"}, indent=1))


if __name__ == "__main__":
    main()
