"""A launcher and all that it starts: asked to stop together, and ended together.

A launcher of others does not pass signals on as a run needs them: SIGTERM at the deepspeed command leaves its ranks
behind, SIGUSR1 kills a torchrun agent, and SIGTERM gives its ranks 30 seconds. So the launcher ignores SIGUSR1, and every
process below it gets SIGUSR1, which asks ranks to save and end; the launcher sees its ranks end and ends itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from distllm.config.errors import EXIT_INTERRUPTED

POLL_S = 0.1
AGAIN_S = 1.0
"""A rank that is still starting does not hear a request, so it is repeated."""
GRACE_S = 10.0
_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Request:
    """What the outside wants of a family: nothing, to save and end, or to end at once. Set from handlers and threads."""

    def __init__(self, *, saves: bool = True) -> None:
        """Args:
        saves: whether what runs saves and ends when it is asked to; else the first signal ends it at once.
        """
        self.stop = threading.Event()
        self.kill = threading.Event()
        self._saves = saves

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a signal: the first asks to stop, a second Ctrl-C kills."""
        if not self._saves or (number == signal.SIGINT and self.stop.is_set()):
            self.kill.set()
        self.stop.set()

    @contextlib.contextmanager
    def caught(self):  # type: ignore[no-untyped-def]
        """Take this process's stop signals while the block runs."""
        before = {number: signal.getsignal(number) for number in _STOP}
        for number, handler in before.items():
            if number != signal.SIGHUP or handler != signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, self.note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_family(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    request: Request,
    folder: Path | None = None,
    grace_s: float = GRACE_S,
) -> int:
    """Run a launcher until it ends; whatever it started ends with it.

    Args:
        argv: the launcher's command.
        environment: all of its variables.
        request: when it says stop, every process of the family gets SIGUSR1, again and again.
        folder: the working folder; None is this one.
        grace_s: seconds between SIGTERM and SIGKILL for what is left.

    Returns:
        The launcher's exit code, 128 + n for signal n, or 130 when it was killed on request.
    """
    _adopt_orphans()
    launcher = subprocess.Popen(
        list(argv), env=dict(environment), cwd=folder, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_prepare()
    )
    asked = 0.0
    try:
        while launcher.poll() is None and not request.kill.is_set():
            if request.stop.is_set() and time.monotonic() - asked > AGAIN_S:
                _send(signal.SIGUSR1)
                asked = time.monotonic()
            time.sleep(POLL_S)
    finally:
        _end(launcher, 0.0 if request.kill.is_set() else grace_s)
    code = launcher.returncode
    if request.kill.is_set():
        return EXIT_INTERRUPTED
    return code if code >= 0 else 128 - code


def _end(launcher: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM, a while, SIGKILL, for every process that is left."""
    deadline = time.monotonic() + grace_s
    _send(signal.SIGTERM)
    while _members() and time.monotonic() < deadline:
        _reap(launcher)
        time.sleep(POLL_S)
    while _members():
        _send(signal.SIGKILL)
        _reap(launcher)
        time.sleep(POLL_S)
    launcher.wait()


def _reap(launcher: subprocess.Popen[bytes]) -> None:
    """Collect orphans that came to this process, without taking the launcher's code from its Popen."""
    launcher.poll()
    for pid in _members():
        if pid != launcher.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _send(number: int) -> None:
    for pid in _members():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _members() -> list[int]:
    """The processes below this one, its zombies too until they are collected."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, heads = [], [os.getpid()]
    while heads:
        heads = [child for head in heads for child in children.get(head, [])]
        found += heads
    return found


def _parents() -> list[tuple[int, int]]:
    """(process, parent) of all; processes that are done and only wait to be collected are left out."""
    if sys.platform != "linux":
        told = subprocess.run(["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, check=False).stdout
        rows = [line.split() for line in told.decode(errors="replace").splitlines()]
        return [(int(row[0]), int(row[1])) for row in rows if len(row) == 3 and not row[2].startswith("Z")]
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            # Errors replaced: the name in it is cut after 15 bytes, in the middle of a character too.
            state, parent = Path(entry.path, "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in ("Z", "X"):
            found.append((int(entry.name), int(parent)))
    return found


def _adopt_orphans() -> None:
    """On Linux, what a launcher leaves behind becomes a child of this process, and is found."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _prepare() -> Callable[[], None]:
    """What the launcher's process does first: ignore SIGUSR1, and get SIGTERM when this process dies."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return prepare
