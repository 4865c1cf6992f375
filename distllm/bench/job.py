"""Cells inside a job: the ranks that a launcher started each fork one process for each cell, and agree on what came of it.

A cell that dies, of memory too, takes its own processes with it and not the job: the ranks themselves compute nothing, hold no
process group and no CUDA context, and talk through the launcher's store alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distllm.comm import World, meeting_store
from distllm.rank_facts import RankFacts, node_name
from distllm.verify.ranks import GRACE_S, Broken, die_with, told

T = TypeVar("T")
POLL_S = 0.1


class Job:
    """The ranks of this job."""

    def __init__(self, facts: RankFacts, *, cuda: bool, timeout_s: float = 120.0) -> None:
        """Find the other ranks.

        Args:
            facts: what the launcher says of this one.
            cuda: whether cells run on GPUs.
            timeout_s: seconds to wait for the others.
        """
        self.rank, self.size = facts.rank, facts.size
        self._local_rank, self._local_size = facts.local_rank, facts.local_size
        self._cuda, self._cell = cuda, 0
        self._store: Any = dist.PrefixStore("distllm-bench", meeting_store(facts, timeout_s=timeout_s))
        self._store.set(f"node-{self.rank}", node_name())

    def nodes(self) -> dict[str, int]:
        """How many ranks each node has, by its name, in the order of their first ranks."""
        keys = [f"node-{rank}" for rank in range(self.size)]
        self._store.wait(keys, timedelta(minutes=5))
        return dict(Counter(self._store.get(key).decode() for key in keys))

    def meet(self) -> None:
        """Wait until every rank of the job is here."""
        store = dist.PrefixStore(f"meeting-{self._cell}", self._store)
        self._cell += 1
        store.set(str(self.rank), "here")
        store.wait([str(rank) for rank in range(self.size)], timedelta(hours=1))

    def leave(self) -> None:
        """Go; rank 0, which may serve the store, as the last."""
        store = dist.PrefixStore("leaving", self._store)
        store.set(str(self.rank), "gone")
        if self.rank == 0:
            store.wait([str(rank) for rank in range(self.size)], timedelta(minutes=5))

    def on_ranks(self, function: Callable[[World], T], size: int, *, timeout_s: float) -> list[T] | Broken:
        """Call `function(world)` in a new process of the first `size` ranks; every rank of the job calls this alike.

        Args:
            function: called in each process; what it returns is sent back by pickle.
            size: the world's size, at most the job's.
            timeout_s: seconds for all of it.

        Returns:
            The answers by rank, on every rank of the job; or why there are none.
        """
        assert size <= self.size
        store = dist.PrefixStore(f"cell-{self._cell}", self._store)
        self._cell += 1
        deadline = time.monotonic() + timeout_s
        if self.rank < size:
            answer = self._mine(function, size, store, timeout_s)
            store.set(f"answer-{self.rank}", pickle.dumps(answer).hex())
        answers = []
        for rank in range(size):
            # Each rank answers within the time for a cell; a rank that is gone does not.
            wait = timedelta(seconds=max(0.0, deadline - time.monotonic()) + 30.0)
            store.wait([f"answer-{rank}"], wait)
            answers.append(pickle.loads(bytes.fromhex(store.get(f"answer-{rank}").decode())))
        broken = [answer for good, answer in answers if not good]
        if broken:
            first = int(store.get("failed"))
            return min(broken, key=lambda one: (not one.problems, one is not answers[first][1]))
        return [answer for _, answer in answers]

    def _mine(self, function: Callable[[World], T], size: int, store: Any, timeout_s: float) -> tuple[bool, Any]:
        """What this rank's process came to; it ends when another's has failed."""
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        done = context.Event()
        args = (function, size, store, sender, done, timeout_s, os.getpid())
        child = context.Process(target=self._child, args=args, daemon=True)
        with warnings.catch_warnings():  # newer Pythons warn of forking beside threads; ours hold no lock of the child's
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        sender.close()
        try:
            answer = self._answer(receiver, store, timeout_s)
            if answer[0]:
                done.set()
                child.join(5.0)
            elif not store.check(["failed"]):
                store.set("failed", str(self.rank))
            return answer
        finally:
            if child.is_alive():
                child.kill()
            child.join()

    def _answer(self, receiver: Connection, store: Any, timeout_s: float) -> tuple[bool, Any]:
        deadline = time.monotonic() + timeout_s
        others_failed = False
        while time.monotonic() < deadline:
            if receiver.poll(POLL_S):
                try:
                    good, answer = receiver.recv()
                    return good, answer
                except EOFError:
                    return False, Broken(f"rank {self.rank} died without a word")
            if not others_failed and store.check(["failed"]):
                others_failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
        return False, Broken("another rank failed" if others_failed else f"no answer of rank {self.rank} in {timeout_s:.0f} s")

    def _child(
        self, function: Callable[[World], Any], size: int, store: Any, sender: Any, done: Any, timeout_s: float, parent: int
    ) -> None:
        """The life of the process of a cell."""
        die_with(parent)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        device = torch.device("cuda", self._local_rank) if self._cuda else torch.device("cpu")
        try:
            if self._cuda:
                torch.cuda.set_device(device)
            if size > 1:
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if self._cuda else "gloo", store=store.clone(), rank=self.rank, world_size=size,
                    timeout=timedelta(seconds=min(60.0, timeout_s)),
                )  # fmt: skip
            local = max(1, min(size - (self.rank - self._local_rank), self._local_size))
            answer = (True, function(World(self.rank, size, self._local_rank, local, device)))
        except BaseException as error:
            answer = (False, told(error))
        with contextlib.suppress(OSError):
            sender.send(answer)
        sender.close()
        if answer[0]:  # one that ends early closes connections that another may still be making
            done.wait(timeout_s)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
