"""Facts of the machine that configs and launchers share."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
