"""Ranks of one layout as forked processes: they live as long as one trial, and never longer than this one.

A fork has torch and the model's classes loaded and the reference in memory: two ranks start in 0.1 s where a fresh process
takes 4 s. A child sets one thread first, because OpenMP does not survive a fork.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch._dynamo  # an optimizer imports it at its first step: once here, not in every rank (1 s)
import torch.distributed as dist

from distllm.comm import World
from distllm.config.errors import ConfigError, DistllmError

T = TypeVar("T")
GRACE_S = 1.0  # for the others to say why they failed, when one has
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Broken:
    """A trial that brought no answer."""

    reason: str
    """One line."""
    problems: tuple[str, ...] = ()
    """Of a layout that was refused: its rules."""
    trace: str = ""


def on_ranks(
    function: Callable[[World], T], size: int, *, timeout_s: float, device: str = "cpu", fake: tuple[int, ...] | None = None
) -> list[T] | Broken:
    """Call `function(world)` on `size` ranks and collect what each returns, by rank.

    Args:
        function: called in each rank; what it returns is sent back by pickle.
        size: the world's size.
        timeout_s: seconds for the whole trial, after which every rank is killed.
        device: cpu or cuda; this process must not have used CUDA.
        fake: only these ranks, one after another, each alone in a world of `size` whose collectives do nothing.

    Returns:
        The answers, or why there are none: an exception of a rank, a rank that died, or the time that is up.
    """
    numbers = list(range(size)) if fake is None else list(fake)
    if fake is not None:
        answers = []
        for number in numbers:
            answer = _together(function, [number], size, timeout_s=timeout_s, device=device, fake=True)
            if isinstance(answer, Broken):
                return answer
            answers += answer
        return answers
    return _together(function, numbers, size, timeout_s=timeout_s, device=device, fake=False)


def _together(
    function: Callable[[World], T], numbers: Sequence[int], size: int, *, timeout_s: float, device: str, fake: bool
) -> list[T] | Broken:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="distllm-verify-") as folder, _running() as ranks:
        store = Path(folder) / "store"
        done = context.Event()  # a rank that ends early closes connections that another may still be making
        receivers: dict[Connection, int] = {}
        for number in numbers:
            receiver, sender = context.Pipe(duplex=False)
            facts = (function, number, size, store, sender, done, timeout_s, device, fake, os.getpid())
            rank = context.Process(target=_rank, args=facts, daemon=True)
            with warnings.catch_warnings():  # newer Pythons warn of forking beside threads; ours hold no lock of the child's
                warnings.simplefilter("ignore", DeprecationWarning)
                rank.start()
            sender.close()
            ranks.append(rank)
            receivers[receiver] = number
        answers = _collect(receivers, timeout_s)
        if all(good for good, _ in answers.values()):
            done.set()
            for rank in ranks:
                rank.join(5.0)
            interrupted = False
        else:
            for rank in ranks:
                rank.join(GRACE_S / len(ranks))
            # Ctrl-C reaches all processes of a terminal. While this one forks, Python drops it.
            interrupted = any(rank.exitcode == -signal.SIGINT for rank in ranks)
    if interrupted:
        raise KeyboardInterrupt
    failed = {number: answer for number, (good, answer) in answers.items() if not good}
    if failed:
        return _first_cause(failed)
    return [answers[number][1] for number in numbers]


@contextmanager
def _running() -> Iterator[list[Any]]:
    """Processes that are started inside; whatever happens, none is left afterwards."""
    ranks: list[Any] = []
    try:
        yield ranks
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()


def _collect(receivers: dict[Connection, int], timeout_s: float) -> dict[int, tuple[bool, Any]]:
    """The answer of every rank; when one fails, the others have GRACE_S to say what they know."""
    answers: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout_s
    waiting = dict(receivers)
    failed = False
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            left = sorted(waiting.values())
            why = Broken("another rank failed") if failed else Broken(f"no answer of rank {left[0]} in {timeout_s:.0f} s")
            return answers | dict.fromkeys(left, (False, why))
        for connection in ready:
            assert isinstance(connection, Connection)
            number = waiting.pop(connection)
            try:
                answers[number] = connection.recv()
            except EOFError:
                answers[number] = (False, Broken(f"rank {number} died without a word"))
            if not answers[number][0] and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
    return answers


def _first_cause(failed: dict[int, Broken]) -> Broken:
    """Of several failures the one that the others follow from: a refusal, else what is no lost connection."""
    echoes = ("closed by peer", "reset by peer", "timed out", "another rank failed", "connection", "gloo")

    def order(item: tuple[int, Broken]) -> tuple[bool, bool, int]:
        number, broken = item
        return not broken.problems, any(echo in broken.reason.lower() for echo in echoes), number

    return min(failed.items(), key=order)[1]


def _rank(
    function: Callable[[World], Any], rank: int, size: int, store: Path, sender: Connection, done: Any, timeout_s: float,
    device: str, fake: bool, parent: int,
) -> None:  # fmt: skip
    """The life of a child."""
    die_with(parent)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    target = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    try:
        if device == "cuda":
            torch.cuda.set_device(target)
        if fake:
            _join_fake(rank, size)
        elif size > 1:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank,
                world_size=size, timeout=timedelta(seconds=min(60.0, timeout_s)),
            )  # fmt: skip
        answer = (True, function(World(rank, size, rank, size, target)))
    except BaseException as error:
        answer = (False, told(error))
    sender.send(answer)
    sender.close()
    if answer[0]:  # one that failed goes at once, so that the others fail too
        done.wait(timeout_s)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _join_fake(rank: int, size: int) -> None:
    """Be one rank of a world without the others; its collectives return at once and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


def told(error: BaseException) -> Broken:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ConfigError):
        return Broken(error.problems[0], tuple(error.problems))
    kind = "" if isinstance(error, DistllmError) else f"{type(error).__name__}: "
    return Broken(f"{kind}{lines[0] if lines else 'no text'}", trace=traceback.format_exc())


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, in whatever way."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
