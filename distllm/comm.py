"""The life of the process group, the facts of a rank, and the few hand-made collectives.

This is the only file below `launch.py` that reads the environment: what torchrun, or distllm's own launcher, tells a rank.
Every function does nothing when the world has one rank, so one process and many are one code path.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Place:
    """Where a rank is in its run, for those who watch it: plain attributes, so that saying it costs an assignment."""

    def __init__(self) -> None:
        self.step = 0
        """The optimizer step that it is at, from 1; 0 before the first."""
        self.phase = "start"
        self.first = True
        """Whether it is the first time in this phase, which may take long: kernels are loaded, blocks compiled."""
        self.moves = 0
        """Grows with every phase that it comes to."""
        self.folder: Path | None = None
        """The run folder."""
        self._been: set[str] = set()

    def enter(self, phase: str) -> None:
        """Come to a phase: start, data, step, evaluation, sample, checkpoint, end."""
        self.first = phase not in self._been
        self._been.add(phase)
        self.phase = phase
        self.moves += 1


@dataclass(frozen=True)
class World:
    """The facts of this rank; given to whoever needs them, never looked up."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    place: Place = field(default_factory=Place, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes logs, manifests and metrics."""
        return self.rank == 0


def start(device: str = "auto", *, timeout_s: float = 120.0) -> World:
    """Join the process group that the launcher described, or be a world of one.

    Args:
        device: `auto`, `cpu` or `cuda`; auto is cuda where there is a GPU.
        timeout_s: seconds after which a collective that a rank does not join is an error.

    Returns:
        The facts of this rank.

    Raises:
        ValueError: cuda was asked for and there is none, or fewer than local ranks.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: no CUDA device is available here; use device=cpu or device=auto")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "start at most that many ranks on it"
        )
    target = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(target)
    if size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            init_method=os.environ.get("DISTLLM_INIT_METHOD", "env://"),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
    return World(rank, size, local_rank, local_size, target)


def local_store() -> str | None:
    """The file in which the ranks of one machine meet; None where they meet in another way."""
    method = os.environ.get("DISTLLM_INIT_METHOD", "")
    return method.removeprefix("file://") if method.startswith("file://") else None


def stop(world: World, *, code: int) -> None:
    """Leave the process group; with several ranks, end the process at once with `code`.

    gloo's threads can outlive the interpreter and abort a clean run at exit, so a rank of many leaves by `os._exit`
    after its output is flushed. A rank that failed does not wait for the others.
    """
    if world.size == 1:
        return
    if code in (0, 75):
        # A rank whose work is done does not fail because another takes long to close its files.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Add `tensor` (any shape) over the ranks of `group`, in place; `None` is a group of one."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def broadcast(value: T, world: World) -> T:
    """Give every rank rank 0's `value` (any picklable object of ours, never a file's content)."""
    if world.size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: T, world: World) -> list[T]:
    """Give every rank the values of all ranks, in rank order."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def gather_over(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Give every rank of `group` the values of all of them, in order; `None` is a group of one."""
    if group is None or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def any_rank(flag: bool, world: World) -> bool:
    """Whether `flag` is true on at least one rank; the same answer on every rank."""
    if world.size == 1:
        return flag
    vote = torch.tensor(int(flag), device="cpu")
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote)


def first_error(error: BaseException | None, world: World) -> BaseException | None:
    """The error of the lowest rank that has one, on every rank; so that all ranks fail together and one tells it."""
    errors: Sequence[BaseException | None] = gather(error, world)
    return next((e for e in errors if e is not None), None)


def main_first(work: Callable[[], T], world: World, *, patience_s: float = 7 * 24 * 3600.0) -> T:
    """Let rank 0 do `work` while the others wait, however long it takes, and give all ranks its result.

    Args:
        work: called on rank 0 only; what it returns is sent to the others, so it is small.
        world: this rank's facts.
        patience_s: how long the others wait, where other collectives give up much sooner.

    Raises:
        Whatever `work` raised, on every rank.
    """
    if world.size == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience_s), group_desc="main_first")
    box: list[Any] = [None, None]
    if world.is_main:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    dist.destroy_process_group(group)
    if box[1] is not None:
        raise box[1]
    return box[0]


class Agreement:
    """Flags that ranks raise by themselves (a signal came, time is up) made one answer for all, without waiting.

    Each call sends this rank's flags and returns what the ranks together said at the call before; by then the exchange
    has long ended. All ranks call it equally often and get the same answers.
    """

    def __init__(self, world: World, *, flags: int) -> None:
        self._world = world
        self._flags = torch.zeros(flags, dtype=torch.int32)
        self._work: dist.Work | None = None

    def exchange(self, flags: Sequence[bool]) -> list[bool]:
        """Send `flags`; get the flags that were raised by any rank at the last call (one rank: at this call)."""
        if self._world.size == 1:
            return list(flags)
        answer = self.last()
        self._flags = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, async_op=True)
        return answer

    def last(self) -> list[bool]:
        """Wait for the exchange under way and return its answer; call it before leaving the group."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [bool(flag) for flag in self._flags.tolist()]
