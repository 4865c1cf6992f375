"""Whether a process of this machine lives, without asking it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

_START, _EXIT_CODE = 19, 49  # proc_pid_stat(5), fields 22 and 52, counted after the name


@dataclass(frozen=True)
class Process:
    """A process by its number, and what tells it from a later one of that number, or of another machine."""

    machine: str
    """The boot and the namespace of process numbers; empty where there is no /proc, and nothing is known of others."""
    pid: int
    born: str

    @staticmethod
    def own() -> Process:
        """This process."""
        fields = _stat(os.getpid())
        return Process(_machine() if fields else "", os.getpid(), fields[_START] if fields else "")

    def end(self) -> str | None:
        """How it ended; None while it lives, and for a process of another machine."""
        if not self.machine or self.machine != _machine():
            return None
        fields = _stat(self.pid)
        if not fields or fields[_START] != self.born or fields[0] == "X":
            return "died"
        if fields[0] != "Z":
            return None
        code = int(fields[_EXIT_CODE]) if len(fields) > _EXIT_CODE else 0
        if code & 0x7F:
            name = signal.Signals(code & 0x7F).name
            return f"was ended by {name}" + (" (often: the machine is out of memory)" if name == "SIGKILL" else "")
        return "died"

    def stopped(self) -> bool:
        """Whether it is stopped by a signal, such as SIGSTOP; False for a process of another machine."""
        if not self.machine or self.machine != _machine():
            return False
        fields = _stat(self.pid)
        return bool(fields) and fields[_START] == self.born and fields[0] == "T"

    def go_on(self) -> None:
        """Let a stopped process run again, so that it can end."""
        if self.stopped():
            os.kill(self.pid, signal.SIGCONT)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; none if there is no such process, or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
