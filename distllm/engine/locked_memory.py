"""How much memory a process may lock: what is read from files and written to them past the page cache must not be moved."""

from __future__ import annotations

import ctypes
import mmap
import resource

from distllm.config.errors import ConfigError


def refuse_low_limit(needed: int, *, key: str) -> None:
    """Refuse files whose buffers this process may not lock: DeepSpeed's op ends it then by an assertion in C++.

    Args:
        needed: bytes, at least.
        key: what asks for files.

    Raises:
        ConfigError: the limit is lower, and holds for this process.
    """
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or needed <= limit or _can_lock(limit + mmap.PAGESIZE):
        return
    told = f"locks {needed / 2**20:,.1f} MiB and more a process, and may lock {limit / 2**20:,.1f}"
    raise ConfigError([f"{key}=nvme: {told}; nearest: cpu, or `ulimit -l unlimited` before the start"])


def _can_lock(size: int) -> bool:
    """Whether that many bytes can be locked at once; with the right to (CAP_IPC_LOCK) any number can."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, size) as room:
        at = ctypes.addressof(held := ctypes.c_char.from_buffer(room))
        locked = libc.mlock(ctypes.c_void_p(at), ctypes.c_size_t(size)) == 0
        if locked:
            libc.munlock(ctypes.c_void_p(at), ctypes.c_size_t(size))
        del held
    return locked
