"""The life of the process group, the facts of a rank, and the few hand-made collectives.

What a launcher's environment says is read here, through `rank_facts`, and nowhere below.
Every function does nothing when the world has one rank, so one process and many are one code path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distllm.interfaces import interface_toward
from distllm.rank_facts import RankFacts, rank_facts

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
        self.telling = False
        """Whether it is about to tell how another rank ended, which no other will tell then."""
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
        ValueError: cuda was asked for and there is none, or fewer than local ranks; the launcher's variables contradict
            each other; the port of the meeting point is in use.
    """
    facts = rank_facts() or RankFacts("", 0, 1, 0, 1, "env://", "127.0.0.1", 0)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: no CUDA device is available here; use device=cpu or device=auto")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cuda" and facts.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {facts.local_rank}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "start at most that many ranks on it"
        )
    target = torch.device(kind, facts.local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(target)
    if facts.size > 1:
        _join(facts, "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timedelta(seconds=timeout_s))
    return World(facts.rank, facts.size, facts.local_rank, facts.local_size, target)


def _join(facts: RankFacts, backend: str, timeout: timedelta) -> None:
    """Meet the other ranks, over the interface that leads to the meeting point."""
    if facts.meet != "env://":
        _use_interface("127.0.0.1")  # a file is the meeting point of one machine
        dist.init_process_group(backend, init_method=facts.meet, rank=facts.rank, world_size=facts.size, timeout=timeout)
    else:
        _use_interface(facts.address)
        store = _store(facts, timeout)
        dist.init_process_group(backend, store=store, rank=facts.rank, world_size=facts.size, timeout=timeout)
    # A rank that fails at once, and leaves, would break the connecting of those that are slower; so all wait here, on the CPU.
    dist.all_reduce(torch.zeros(1))


def meeting_store(facts: RankFacts, *, timeout_s: float) -> dist.Store:
    """The store in which the ranks of a job meet, for those that form no process group themselves.

    Args:
        facts: of this rank; rank 0 serves the store, unless the launcher does.
        timeout_s: seconds to wait for the others.

    Raises:
        ValueError: an address or a port that cannot be.
    """
    if facts.meet != "env://":
        _use_interface("127.0.0.1")  # a file is the meeting point of one machine
        return dist.FileStore(facts.meet.removeprefix("file://"), facts.size)
    _use_interface(facts.address)
    return _store(facts, timedelta(seconds=timeout_s))


def _use_interface(address: str) -> None:
    """Let gloo listen where the job's network is: by itself it takes what the host's own name resolves to."""
    given = os.environ.get("GLOO_SOCKET_IFNAME", "")
    here = [name for _, name in socket.if_nameindex()]
    for one in filter(None, given.split(",")):
        if one not in here:  # gloo's ranks would only say that they lost each other
            near = next((name for name in here if name != "lo"), "lo")
            raise ValueError(f"GLOO_SOCKET_IFNAME={one}: this machine has no such network interface; nearest: {near}")
    name = interface_toward(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _store(facts: RankFacts, timeout: timedelta) -> dist.TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT; rank 0 serves it on that address alone, where torch would on all interfaces.

    Source: https://github.com/pytorch/pytorch/issues/173909 (a TCPStore ignores its host name when it binds).
    """
    serves = facts.rank == 0 and not facts.agent_store
    listener = _listener(facts.address, facts.port) if serves else None
    return dist.TCPStore(
        facts.address, facts.port, facts.size, serves, timeout,
        master_listen_fd=listener.detach() if listener is not None else None,
    )  # fmt: skip


def _listener(address: str, port: int) -> socket.socket:
    """A listening socket on one address; on all where the address belongs to no interface of this machine."""
    family, _, _, _, target = _resolve(address, port)
    try:
        return socket.create_server(target[:2], family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # such as an address that a router maps to this machine
            return socket.create_server(("", port), family=family, backlog=1024)
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"MASTER_PORT={port}: another program listens there on {address}; nearest: another port, "
                "such as distllm launch --port or MASTER_PORT gives"
            ) from error
        raise


def _resolve(address: str, port: int) -> Any:
    try:
        return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"MASTER_ADDR={address}: this name has no address here; nearest: the first node's IP address") from error


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
