"""What it costs that the ranks watch over each other: store operations and CPU time a second, and the part in each step.

    python docs/benchmarks/watch.py > docs/benchmarks/watch.json

Two gloo ranks exchange small tensors in turns of 10 ms for a while, once with files for the beats, as under the local
launcher, and once with a TCP store, as under torchrun. Counted are the operations on them, and the CPU time of the
watching thread of each rank.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tokenise import facts

from distllm import comm
from distllm.comm import Place
from distllm.watch.watch import Watch

LOST_S, STALL_S = 10.0, 60.0


class Counting(Watch):
    """Counts the operations on the slots, and adds up the CPU time of the thread."""

    def __init__(self, world: comm.World) -> None:
        self.count: Counter[str] = Counter()
        self.cpu_s = 0.0
        super().__init__(world, lost_s=LOST_S, stall_s=STALL_S)
        for name in ("put", "get", "told"):
            setattr(self._slots, name, self._counted(name, getattr(self._slots, name)))

    def _counted(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            self.count[name] += 1
            return operation(*given)

        return call

    def _look(self) -> None:
        before = time.thread_time()
        super()._look()
        self.cpu_s += time.thread_time() - before


def rank(number: int, seconds: float, environment: dict[str, str], answers: Any) -> None:
    """Exchange, and tell what the watch did meanwhile."""
    torch.set_num_threads(1)
    os.environ.update(environment | {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"})
    world = comm.start("cpu")
    watch = Counting(world)
    tensor, turns = torch.ones(8), round(seconds / 0.01)
    start = time.monotonic()
    for step in range(turns):
        world.place.step = step
        world.place.enter("step")
        dist.all_reduce(tensor)
        time.sleep(0.01)
    took = time.monotonic() - start
    counted = {f"{name}_a_second": round(n / took, 2) for name, n in sorted(watch.count.items())}
    share = {
        "thread_cpu_share": float(f"{watch.cpu_s / took:.2g}"),
        "cpu_us_a_look": round(1e6 * watch.cpu_s / watch.count["told"], 1),
    }
    watch.stop()
    answers.put((number, counted | share | {"seconds": round(took, 1)}))
    answers.close()
    answers.join_thread()
    comm.stop(world, code=0)


def of_two_ranks(seconds: float, environment: dict[str, str]) -> list[dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=rank, args=(n, seconds, environment, answers)) for n in range(2)]
    for process in ranks:
        process.start()
    told = dict(answers.get(timeout=seconds + 120.0) for _ in ranks)
    for process in ranks:
        process.join(30.0)
    return [told[n] for n in range(2)]


def ns_of_a_phase(count: int = 200_000) -> float:
    """Coming to a phase, which the loop does three times a step or so."""
    place, start = Place(), time.thread_time()
    for step in range(count):
        place.step = step
        place.enter("step")
    return round(1e9 * (time.thread_time() - start) / count, 1)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = of_two_ranks(arguments.seconds, {"DISTLLM_INIT_METHOD": f"file://{folder}/store"})
    store = of_two_ranks(arguments.seconds, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()})
    results = {"files_by_rank": files, "tcp_store_by_rank": store, "ns_of_coming_to_a_phase": ns_of_a_phase()}
    print(json.dumps(facts(["torch"]) | {"lost_s": LOST_S, "results": results}, indent=1))


if __name__ == "__main__":
    main()
