"""Facts of the machine that configs and launchers share."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies


def cores() -> int:
    """The CPU cores that this process may use: those it is bound to, or as many as a container's CPU time is worth."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(bound, cpu_limit())))


def cpu_limit(mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """The CPU time of this process's control groups, in cores (`docker run --cpus`, a pod's limit); inf where none is set.

    More threads than that are held up together: one waits for another that the kernel lets run only in the next period.

    Args:
        mount: where control groups are mounted. In a container its own is at the top, whatever path `own` has.
        own: the groups of this process, a line each: `0::/path` (version 2), `1:cpu,cpuacct:/path` (version 1).
    """
    found = [math.inf]
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):
            if not controllers:
                words = _text(mount / folder / "cpu.max").split()
            elif "cpu" in controllers.split(","):
                place = mount / controllers / folder
                words = [_text(place / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                break
            if len(words) == 2 and all(word.isdecimal() for word in words):  # "max" and -1: no limit
                found.append(int(words[0]) / int(words[1]))
    return min(found)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def reachable(url: str, *, timeout_s: float = 3.0) -> bool:
    """Whether something listens at a web address; asked once, where a download would retry for a minute.

    Behind a proxy this cannot be seen, so the answer is yes.
    """
    parts = urlsplit(url)
    if parts.scheme in getproxies():
        return True
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def flush(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk before a rename makes it count."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
