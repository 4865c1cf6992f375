"""The local launcher: several ranks of one command on this machine, living and dying together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from distllm.config.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_OK, EXIT_STOPPED
from distllm.config.machine import cores

GRACE_S = 5.0  # a rank whose partner died hangs in a collective; its own stop request would wait there forever
POLL_S = 0.05
_PASSED_ON: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def local_ranks(argv: list[str], count: int, *, module: str = "distllm", grace_s: float = GRACE_S) -> int:
    """Run `python -m distllm ARGV` as `count` ranks on this machine, and wait for all of them.

    Each rank is the leader of a process group of its own, so that Ctrl-C in a terminal reaches it once, through this
    launcher. SIGINT, SIGTERM and SIGUSR1 are passed on (SIGHUP as SIGTERM); a second SIGINT kills. When a rank fails, the others
    get SIGTERM and, after `grace_s`, SIGKILL. Ranks never outlive the launcher (on Linux not even when it is killed).

    Args:
        argv: the arguments of the command, without its name.
        count: the number of ranks.
        module: what runs in place of distllm.
        grace_s: seconds between SIGTERM and SIGKILL for the ranks that are left when one has failed.

    Returns:
        The exit code of the rank that failed first (128 + n for signal n), else 75 if a rank stopped on request, else 0.
    """
    with tempfile.TemporaryDirectory(prefix="distllm-") as folder:
        return _Ranks([sys.executable, "-m", module, *argv], count, Path(folder)).run(grace_s)


def local_commands(argv: list[str], count: int, *, module: str = "distllm") -> list[str]:
    """The shell lines that `local_ranks` stands for, a rank each."""
    command = [sys.executable, "-m", module, *argv]
    if count == 1:
        return [shlex.join(command)]
    folder = Path(tempfile.gettempdir()) / f"distllm-{os.getpid()}"
    facts = [[f"{name}={value}" for name, value in _rank_facts(rank, count, folder).items()] for rank in range(count)]
    return [shlex.join(["env", *fact, *command]) for fact in facts]


def _rank_facts(rank: int, count: int, store: Path) -> dict[str, str]:
    """What a rank's environment says; a FileStore, so that no port is opened to the network."""
    facts = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "DISTLLM_INIT_METHOD": f"file://{store}",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        facts["OMP_NUM_THREADS"] = str(max(1, cores() // count))
    return facts


class _Ranks:
    """The running ranks of one command."""

    def __init__(self, command: list[str], count: int, folder: Path) -> None:
        self._command, self._count, self._folder = command, count, folder
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._interrupts = 0
        self._wanted: list[int] = []  # signals that came while the ranks were being started

    def run(self, grace_s: float) -> int:
        before = {number: signal.getsignal(number) for number in _PASSED_ON}
        for number, handler in before.items():
            if number != signal.SIGHUP or handler != signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, self._pass_on)
        try:
            arm = _death_with_parent()
            for rank in range(self._count):
                self._ranks.append(
                    subprocess.Popen(
                        self._command,
                        env=os.environ | _rank_facts(rank, self._count, self._folder / "store"),
                        stdin=subprocess.DEVNULL,  # a background group that read the terminal would be stopped
                        process_group=0,
                        preexec_fn=arm,
                    )
                )
            for number in self._wanted:
                self._send(number)
            return self._wait(grace_s)
        finally:
            self._kill()
            for process in self._ranks:
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self, grace_s: float) -> int:
        """Poll until all have ended; the first failure decides the code and starts the end of the others."""
        failed: int | None = None
        deadline = float("inf")
        while alive := [rank for rank in range(self._count) if not _ended(self._ranks[rank].pid)]:
            failed = self._first_failure(alive) if failed is None else failed
            if failed is not None and deadline == float("inf"):
                self._send(signal.SIGTERM)
                deadline = time.monotonic() + grace_s
            if self._interrupts > 1 or time.monotonic() > deadline:
                self._kill()
                break
            time.sleep(POLL_S)
        if failed is None and self._interrupts <= 1:
            failed = self._first_failure([])
        self._kill()
        codes = [process.wait() for process in self._ranks]
        if failed is not None:
            return self._tell(failed, codes[failed])
        if self._interrupts > 1:
            return EXIT_INTERRUPTED
        return next((code for code in codes if code != 0), 0)

    def _first_failure(self, alive: list[int]) -> int | None:
        """A rank that ended neither well (0) nor stopped on request (75); of several, one ended by a signal."""
        codes = {rank: _code(self._ranks[rank].pid) for rank in range(self._count) if rank not in alive}
        # A rank that is killed breaks the others' connections, so their errors in the same moment only follow from it.
        order = {rank: (code > 0, code == EXIT_LOST, rank) for rank, code in codes.items() if code not in (EXIT_OK, EXIT_STOPPED)}
        return min(order, key=lambda rank: order[rank], default=None)

    def _tell(self, rank: int, code: int) -> int:
        if code >= 0:
            return code  # the rank itself has told why
        if (self._folder / "store.told").exists():
            return 128 - code  # another rank has, and where the run was
        name = signal.Signals(-code).name
        why = " (often: the machine is out of memory)" if -code == signal.SIGKILL else ""
        print(f"distllm: rank {rank} was ended by {name}{why}; the other ranks were stopped", file=sys.stderr)
        return 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
        if len(self._ranks) < self._count:
            self._wanted.append(number)
        else:
            self._send(number)

    def _send(self, number: int) -> None:
        for process in self._ranks:
            if not _ended(process.pid):
                os.kill(process.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    def _kill(self) -> None:
        """End every rank and all that it started. Until `wait` collects a rank, its group's number cannot be another's."""
        for process in self._ranks:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS denies a group of zombies
                    os.killpg(process.pid, signal.SIGKILL)


def _ended(pid: int) -> bool:
    """Whether a child has ended; it stays uncollected."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def _code(pid: int) -> int:
    """The exit code of a child that has ended, negative for a signal, as in subprocess."""
    try:
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return 0
    assert info is not None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def _death_with_parent() -> Callable[[], None] | None:
    """What a new child runs first: ask Linux to kill it when this launcher dies, in whatever way."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    launcher = os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died before the call
            os._exit(1)

    return arm
