"""What a save costs the training: how long it keeps a step waiting, and how much slower steps are while it is written.

    python docs/benchmarks/checkpoint.py [--mib 256] [--rounds 12] [--threads 1] [--out docs/benchmarks/checkpoint.json]

The wait is compared with one bare copy of the same bytes and with torch's DCP. All ways are timed in turns in one run, so
that a busy machine slows all alike. The state is that of a small transformer with AdamW: many tensors of uneven sizes.

`steps_during_write` takes whole training steps (forward, backward, fused AdamW) of another small transformer from the
begin of a background write to its end, against as many without one, once with one core left for the writing thread and
once with torch on all cores. `wall_ratio` and `cpu_ratio` are a step's seconds and its own CPU-seconds (the writing
thread's are not in them) during against without; `extra_s_a_save` is what one save adds to the run's time.
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


def training_step() -> Callable[[], None]:
    """A step of a transformer of 3.2 million parameters on 2 x 128 tokens, about 70 ms of one core."""
    torch.manual_seed(1)
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    model = torch.nn.Sequential(
        torch.nn.Embedding(256, 256),
        torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
        torch.nn.Linear(256, 256),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, 256, (2, 128))

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps_beside(
    step: Callable[[], None], *, before: Callable[[], Any], ended: Callable[[], bool]
) -> tuple[list[float], list[float]]:
    """Steps from `before` to the first one that ends when all has `ended`: seconds of each, and its own CPU-seconds.

    With one thread of torch the CPU-seconds are those of this thread alone; with more they cannot be told apart from the
    writer's, and are left out.
    """
    before()
    wall, cpu = [], []
    while not ended():
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        step()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.thread_time() - cpu_begin)
    return wall, cpu


def measure_steps(chunks: dict[str, Chunk], kept: CheckpointManager, *, threads: int, rounds: int) -> dict[str, Any]:
    """Training steps during a background write against without one, in turns."""
    torch.set_num_threads(threads)
    step = training_step()
    for _ in range(10):
        step()
    names = ("quiet", "quiet_cpu", "during", "during_cpu")
    means: dict[str, list[float]] = {name: [] for name in names}
    counts, extra = [], []
    for number in range(1, rounds + 1):
        wall, cpu = steps_beside(
            step,
            before=lambda number=number: kept.save(10_000 * threads + number, chunks, **ABOUT),
            ended=lambda: kept._pending is None or kept._pending.done(),
        )
        kept.wait()
        left = iter(range(len(wall)))
        quiet, quiet_cpu = steps_beside(step, before=lambda: None, ended=lambda left=left: next(left, None) is None)
        for name, values in zip(names, (quiet, quiet_cpu, wall, cpu), strict=True):
            means[name].append(statistics.fmean(values))
        counts.append(len(wall))
        extra.append(sum(wall) - sum(quiet))
    ratios = [d / q for d, q in zip(means["during"], means["quiet"], strict=True)]
    cpu_ratios = [d / q for d, q in zip(means["during_cpu"], means["quiet_cpu"], strict=True)]
    return {
        "torch_threads": threads,
        "steps_a_write": spread([float(n) for n in counts], 1),
        "step_s_without": spread(means["quiet"]),
        "step_s_during": spread(means["during"]),
        "wall_ratio": spread(ratios, 3),
        **({"cpu_ratio": spread(cpu_ratios, 3)} if threads == 1 else {}),
        "extra_s_a_save": spread(extra, 3),
        "load": round(os.getloadavg()[0], 2),
        "raw": {name: [round(v, 5) for v in values] for name, values in means.items() if threads == 1 or "cpu" not in name},
    }


def without_raw(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_raw(v) for k, v in value.items() if k != "raw"}
    return [without_raw(v) for v in value] if isinstance(value, list) else value


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
    times: dict[str, list[float]] = {
        k: [] for k in ("bare_copy", "blocked", "total", "sync", "dcp_sync", "dcp_async_blocked", "dcp_async_total", "load")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference
        for step in range(1, rounds + 1):
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
            shutil.rmtree(root / "d", ignore_errors=True)
            times["dcp_sync"].append(timed(lambda: dcp.save(values, checkpoint_id=root / "d", no_dist=True)))
            shutil.rmtree(root / "d", ignore_errors=True)
            start = time.perf_counter()
            future = dcp.async_save(values, checkpoint_id=root / "d", no_dist=True)
            times["dcp_async_blocked"].append(time.perf_counter() - start)
            future.result()
            times["dcp_async_total"].append(time.perf_counter() - start)
    steps = [
        measure_steps(chunks, background, threads=threads, rounds=rounds) for threads in sorted({1, os.cpu_count() or 1})
    ]
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
        "steps_during_write": steps,
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
    root, load = Path(tempfile.mkdtemp(dir=asked.folder)), os.getloadavg()[0]
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        result = measure(asked.mib, asked.rounds, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python docs/benchmarks/checkpoint.py " + " ".join(sys.argv[1:]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_at_begin": round(load, 2)},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "safetensors")}},
        "note": "both fsync their files; dcp takes no digests, distllm takes the sha256 of every file",
        **result,
    }
    text = json.dumps(record, indent=1)
    if asked.out:
        asked.out.write_text(text + "\n")
    print(json.dumps(without_raw(record), indent=1))


if __name__ == "__main__":
    main()
