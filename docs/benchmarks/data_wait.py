"""The share of a step that waits for data, with a step of 50 ms, and what a batch costs.

    python docs/benchmarks/data_wait.py > docs/benchmarks/data_wait.json

The step sleeps, as a process does while its GPU computes, or computes on the CPU for that long. The first step, which
waits for the thread to start, is counted apart. On a machine with other work the largest waits are the system's: look at
`load_average` beside the sum, and at the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from tokenise import facts

from distllm.config.check import resolve_layout
from distllm.config.schema import Config
from distllm.data.loader import step_batches
from distllm.data.packed_text import PackedText
from distllm.data.prepare import prepare


def sleep(step_s: float) -> None:
    """A step on a GPU."""
    time.sleep(step_s)


def compute(step_s: float) -> None:
    """A step on one CPU core, of matrix products."""
    end, matrix = time.perf_counter() + step_s, torch.ones(256, 256)
    while time.perf_counter() < end:
        matrix @ matrix


def wait(samples: PackedText, *, batch: int, steps: int, step_s: float, step: Callable[[float], None]) -> dict[str, object]:
    """Run steps and measure how long each waits for its batch."""
    batches = step_batches(samples, start=0, dp_rank=0, dp_size=1, prefetch=16, pin=False)
    waits, begin = [], time.perf_counter()
    for i in range(steps + 1):
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
        if i == 0:
            begin = time.perf_counter()
        step(step_s)
    whole = time.perf_counter() - begin
    batches.close()
    return {
        "step": step.__name__, "batch": batch, "seq_len": samples.seq_len, "cross_documents": samples.cross_documents,
        "steps": steps, "first_wait_ms": round(1000 * waits[0], 3),
        "median_wait_us": round(1e6 * statistics.median(waits[1:]), 1),
        "largest_wait_us": round(1e6 * max(waits[1:]), 1),
        "median_wait_percent_of_step": round(100 * statistics.median(waits[1:]) / step_s, 4),
        "wait_percent_of_all": round(100 * sum(waits[1:]) / whole, 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=50.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for length, batch, cross in ((64, 12, True), (256, 8, True), (1024, 8, True), (1024, 8, False)):
            config = Config.model_validate({"data": {"store": folder, "seq_len": length, "cross_documents": cross},
                                            "train": {"micro_batch": batch}})  # fmt: skip
            samples = PackedText(prepare(config), config, resolved=resolve_layout(config, 1))
            results += [
                wait(samples, batch=batch, steps=arguments.steps, step_s=arguments.step_ms / 1000, step=step)
                for step in (sleep, compute)
            ]
    print(json.dumps({**facts(["numpy", "torch"]), "step_ms": arguments.step_ms, "results": results}, indent=1))


if __name__ == "__main__":
    main()
