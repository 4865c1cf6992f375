"""Run a function on real gloo ranks, each a process of its own, and bring the results back.

The function runs in forked children (0.1 s for two ranks, where spawn takes 4 s), so it may be a closure. A child sets
one thread first, because OpenMP does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distllm.comm import World


def on_ranks(function: Callable[[World], Any], size: int, folder: Path, *, timeout_s: float = 90.0) -> list[Any]:
    """Call `function(world)` on `size` gloo ranks and return what each returned (picklable; numpy arrays, not tensors).

    Args:
        function: called in each rank with its World; an exception in any rank is raised here with its traceback.
        size: the number of ranks; also 1 runs in a child.
        folder: an empty temporary folder of the test's own, for the rendezvous file.
        timeout_s: seconds for the whole run, after which every rank is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("rendezvous-*")))
    rendezvous = folder / f"rendezvous-{number}"
    rendezvous.touch()
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    everyone_is_done = context.Event()  # a rank that ends early closes connections that another may still be making
    ranks = [
        context.Process(
            target=_rank, args=(function, rank, size, rendezvous, pipes[rank][1], everyone_is_done, timeout_s), daemon=True
        )
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for _, sender in pipes:
        sender.close()
    try:
        answers = [_receive(receiver, timeout_s) for receiver, _ in pipes]
    finally:
        everyone_is_done.set()
        for rank in ranks:
            rank.join(5.0)
            if rank.is_alive():
                rank.kill()
                rank.join()
    failed = [(i, text) for i, (good, text) in enumerate(answers) if not good]
    if failed:
        raise AssertionError("\n".join(f"rank {i} failed:\n{text}" for i, text in failed))
    return [value for _, value in answers]


def _receive(receiver: Any, timeout_s: float) -> tuple[bool, Any]:
    if not receiver.poll(timeout_s):
        return False, f"no answer in {timeout_s:.0f} s"
    try:
        return receiver.recv()
    except EOFError:
        return False, "the rank died without an answer"


def _rank(
    function: Callable[[World], Any], rank: int, size: int, rendezvous: Path, sender: Any, everyone_is_done: Any, timeout_s: float
) -> None:
    torch.set_num_threads(1)
    try:
        rendezvous_file = rendezvous.with_suffix(".store")
        if size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{rendezvous_file}", rank=rank, world_size=size,
                timeout=timedelta(seconds=min(60.0, timeout_s)),
            )  # fmt: skip
        answer = (True, function(World(rank, size, rank, size, torch.device("cpu"))))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send(answer)
    sender.close()
    if answer[0]:  # one that failed goes at once, so that the others fail too
        everyone_is_done.wait(timeout_s)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
