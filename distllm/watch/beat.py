"""What a rank tells the others about itself, a few hundred bytes about once a second, and where it takes that from.

Nothing here costs a training step anything: the rank's place is a plain attribute that the loop assigns, process groups
count their collectives themselves, and the call stack is looked at from the heartbeat's own thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from traceback import walk_tb
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from distllm.comm import World
from distllm.watch.process import Process

RUNS, STUCK, FAILED, LEFT = "runs", "stuck", "failed", "left"
_COMPILERS = (  # files that are on the stack while torch.compile compiles, and not while compiled code runs
    "torch/_dynamo/convert_frame.py", "torch/_inductor/graph.py", "torch/_inductor/async_compile.py",
)  # fmt: skip
_STACK_LIMIT = 400

Frame = tuple[str, int, str]
"""File, line, function."""


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has entered."""

    name: str
    number: int
    """Counted in its group, from 1; 0 where the recorder is off."""
    group: str
    """The mesh axis, or `all ranks`."""

    def __str__(self) -> str:
        return f"{self.name} #{self.number} of {self.group}" if self.number else self.name


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    number: int
    """Counts the beats: while it grows the rank answers."""
    host: str
    process: Process
    status: str = RUNS
    """`runs`; `stuck`: it lost the connection and looks for the reason; `failed`: it tells its own error; `left`."""
    step: int = 0
    phase: str = "start"
    patient: bool = True
    """Whether it may stand still for long: at the start, while compiling, the first time in a phase, while rank 0 works alone."""
    still_s: float = 0.0
    """Seconds since it last came to another phase or entered a collective."""
    entered: Mapping[str, int] = field(default_factory=dict)
    """Process group -> collectives entered."""
    waits: bool = False
    """Whether its main thread stands inside torch.distributed."""
    collective: Collective | None = None
    """The collective under way, or the last one; known only while it stands still."""
    at: str = ""
    """The file, line and function where its main thread stands; only while it stands still."""

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()


def from_bytes(data: bytes) -> Beat | None:
    """The beat, or None for a torn or empty one."""
    try:
        plain = json.loads(data)
        collective = plain.pop("collective")
        process = Process(**plain.pop("process"))
        return Beat(process=process, collective=None if collective is None else Collective(**collective), **plain)
    except (ValueError, KeyError, TypeError):
        return None


class Pulse:
    """Takes this rank's beats."""

    def __init__(self, world: World, *, thread: int, clock: Callable[[], float]) -> None:
        """Args:
        world: this rank; its place is read.
        thread: the identifier of the thread that trains.
        clock: seconds that pass while the process may run.
        """
        self._world, self._thread, self._clock = world, thread, clock
        self._host, self._process = socket.gethostname(), Process.own()
        self._number = 0
        self._before: tuple[Any, ...] = ()
        self._moved = clock()

    def take(self, status: str = RUNS, *, error: BaseException | None = None) -> Beat:
        """This rank's next beat.

        Args:
            status: how it is.
            error: what ended its training; then it stands where that was raised.
        """
        place, entered, now = self._world.place, _entered(), self._clock()
        moves = (place.moves, place.step, tuple(entered.items()))
        moved, self._before = moves != self._before, moves
        self._moved = now if moved else self._moved
        self._number += 1
        stack = list(_stack(self._thread)) if error is None else _raised_at(error)
        patient = place.first or place.phase in ("start", "checkpoint", "end") or _is_patient(stack)
        known = error is not None or not moved
        collective = _collective() if known else None
        waits = bool(stack) and "/torch/distributed/" in stack[0][0]
        if waits and collective is None:
            collective = Collective(stack[0][2], 0, "")
        return Beat(
            self._world.rank, self._number, self._host, self._process, status, place.step, _phase(place.phase, stack), patient,
            round(now - self._moved, 3), entered, waits, collective, _at(stack) if known else "",
        )  # fmt: skip


def _entered() -> dict[str, int]:
    """Process group -> collectives that this rank has entered.

    Not of a pipeline's groups: their sends and receives count too, and are not equally many on all ranks.
    """
    groups = list(dist.distributed_c10d._world.pg_map)  # a copy: the training thread may make one meanwhile
    counted: dict[str, int] = {}
    for group in groups:
        if group is not None and not group.group_desc.endswith("_pp"):
            counted[group.group_name] = _sequence_number(group)
    return counted


def _sequence_number(group: dist.ProcessGroup) -> int:
    backends = set()  # gloo alone stands for both kinds of device
    for kind in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError):  # the group has none for this kind
            backends.add(group._get_backend(torch.device(kind)))
    total = 0
    for backend in backends:
        with contextlib.suppress(RuntimeError, AttributeError):  # one that does not count
            total += backend._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return total


def _collective() -> Collective | None:
    """The oldest collective under way, or the last one, from torch's flight recorder; None where it is off.

    It is a ring buffer that torch fills anyway (1 us a collective, on by default); reading it takes about a millisecond.
    """
    entries: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):  # of gloo, of NCCL
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            entries += pickle.loads(dump(True, False, False)).get("entries", [])
    if not entries:
        return None
    entries.sort(key=lambda e: e["time_created_ns"])
    entry = next((e for e in entries if not e.get("retired", True)), entries[-1])
    _, axis = entry["process_group"]
    group = "all ranks" if axis in ("default_pg", "undefined", "") else axis.removeprefix("mesh_")
    return Collective(entry["profiling_name"].rpartition(":")[2], entry["collective_seq_id"], group)


def _stack(thread: int) -> Iterator[Frame]:
    """The frames of a thread, innermost first."""
    frame: FrameType | None = sys._current_frames().get(thread)
    count = 0
    while frame is not None and count < _STACK_LIMIT:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame, count = frame.f_back, count + 1


def _raised_at(error: BaseException) -> list[Frame]:
    """The stack where an error was raised, innermost first."""
    frames = [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in walk_tb(error.__traceback__)]
    return frames[::-1]


def _is_patient(stack: list[Frame]) -> bool:
    """Whether it compiles, or rank 0 works while the others wait."""
    alone = any(name == "main_first" and file.endswith("distllm/comm.py") for file, _, name in stack)
    return alone or any(file.endswith(_COMPILERS) for file, _, _ in stack)


def _phase(phase: str, stack: list[Frame]) -> str:
    """A step's phase by what is on the stack; the engine need not say it."""
    if phase != "step":
        return phase
    for file, _, name in stack:
        if name == "backward" and "/torch/" in file:
            return "backward"
        if "/torch/optim/" in file:
            return "update"
        if name == "_call_impl" and file.endswith("torch/nn/modules/module.py"):
            return "forward"
    return "step"


def _at(stack: list[Frame]) -> str:
    """The innermost place outside of torch and of Python's own library."""
    library, torch_part = os.path.dirname(os.__file__) + os.sep, f"{os.sep}torch{os.sep}"
    for file, line, name in stack:
        own = not file.startswith(("<", library)) or "site-packages" in file
        if own and torch_part not in file:
            return f"{os.sep.join(file.split(os.sep)[-2:])}:{line} in {name}"
    return ""
