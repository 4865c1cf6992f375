"""What an error means to the user: its lines on stderr, told once over all ranks, and its exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

from distllm.config.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_MEMORY,
    EXIT_STORAGE,
    ConfigError,
    DistllmError,
)

if TYPE_CHECKING:
    from distllm.comm import World
    from distllm.watch.watch import Watch

_STORAGE = {
    errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission", errno.EPERM: "not permitted", errno.EIO: "the disk reports an error",
    errno.EFBIG: "the file is too large for this file system", errno.ENOTDIR: "is below a file, and needs a folder",
    errno.EEXIST: "is a file, and a folder is needed",
}  # fmt: skip
# torch has no classes for these: what gloo, NCCL, the rendezvous and the allocators say.
_UNREACHABLE = (
    "clients joined", "client socket has timed out", "client socket has failed", "network addresses of", "failed to connect to",
)  # fmt: skip
_LOST = (
    "connection reset by peer", "connection closed by peer", "connection was likely closed", "timed out waiting", "broken pipe",
    "gloo/transport", "nccl error", "ncclremoteerror", "ncclinternalerror", "ncclsystemerror", "connection refused",
    "watchdog caught collective operation timeout", "failed to recv", "failed to send", "connection was closed",
    "read error", "wait timeout",
)  # fmt: skip
_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory", "bad_alloc")


def tell(error: BaseException, *, debug: bool, silent: bool = False) -> int:
    """Say on stderr what went wrong, a line for each problem, and return the exit code.

    Args:
        error: what was raised.
        debug: print its traceback too, on every rank.
        silent: another rank has told it.
    """
    lines, code = describe(error)
    if debug:
        import traceback

        traceback.print_exception(error)
    if not silent:
        for line in lines:
            say(line)
    return code


def describe(error: BaseException) -> tuple[list[str], int]:
    """The lines that tell an error, and the exit code that it ends with."""
    if isinstance(error, ConfigError):
        return error.problems, error.exit_code
    if isinstance(error, DistllmError):
        return [one_line(str(error))], error.exit_code
    if isinstance(error, OSError) and error.errno in _STORAGE:
        place = f"{error.filename}: " if error.filename else ""
        remedy = "free some space, or choose another folder with out=... or data.store=..."
        return [f"{place}{_STORAGE[error.errno]}; {remedy}"], EXIT_STORAGE
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted"], EXIT_INTERRUPTED
    text = str(error).lower()
    is_torchs = isinstance(error, RuntimeError)  # torch.OutOfMemoryError and torch.distributed's are among them
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM) or (
        is_torchs and any(part in text for part in _MEMORY)
    ):  # fmt: skip
        remedy = "lower train.micro_batch or data.seq_len, set activation.mode=full, or spread the model with layout.dp_shard"
        return [f"out of memory; {remedy}"], EXIT_MEMORY
    if is_torchs and any(part in text for part in _UNREACHABLE):
        place = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
        remedy = "check these two, the network, and that all WORLD_SIZE ranks were started"
        return [f"the ranks did not find one another at {place} (MASTER_ADDR:MASTER_PORT); {remedy}"], EXIT_LOST
    if is_torchs and any(part in text for part in _LOST):
        remedy = "look at what the other ranks said; the same command continues from the last checkpoint"
        return [f"lost the connection to another rank, which died or hangs; {remedy}"], EXIT_LOST
    told = one_line(f"{type(error).__name__}: {error}")
    return [f"unexpected error: {told}; --debug shows the traceback. This is a fault of distllm: please report it"], EXIT_BUG


def tell_of_rank(error: BaseException, watch: Watch, *, world: World, debug: bool) -> int:
    """Tell the error that ends this rank, once over all ranks, and return the exit code.

    What only follows from another rank's end is told as that: which rank, where it was, and who waited for it in what.

    Args:
        error: what was raised.
        watch: over the ranks of the world.
        world: this rank's facts.
        debug: print the traceback too, on every rank.
    """
    if isinstance(error, DistllmError | OSError):
        watch.fail()
    else:
        cause = watch.explain(error, lost=describe(error)[1] == EXIT_LOST, timed_out="timed out" in str(error).lower())
        if cause is not None:
            cause.__cause__ = error
            return tell(cause, debug=debug, silent=not str(cause))
    return tell(error, debug=debug, silent=not tells_first(error, world))


def tells_first(error: BaseException, world: World) -> bool:
    """Whether this rank is the first of all ranks with an error; the others' errors are the same, or follow from it."""
    if world.size == 1:
        return True
    import torch.distributed as dist

    if "DISTLLM_INIT_METHOD" in os.environ and describe(error)[1] == EXIT_LOST and "timed out" not in str(error).lower():
        return False  # of local ranks, the one that died has told why, or the launcher does
    try:
        return int(dist.distributed_c10d._get_default_store().add("distllm/told", 1)) == 1
    except Exception:  # the store's host has gone, and has told
        return world.is_main


def say(line: str) -> None:
    """Write a line of distllm's to stderr."""
    print(f"distllm: {line}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """The first line of a text that has anything on it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else text.strip()
