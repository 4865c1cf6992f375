"""What stays in a folder of checkpoints: taking the folder, tidying it, deleting old ones, setting bad ones aside."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
from pathlib import Path

from distllm.checkpoint.durable import discard, sync_folder
from distllm.checkpoint.find import BEST, candidates, check, check_sizes, linked
from distllm.checkpoint.manifest import NewerFormat
from distllm.config.errors import CheckpointError
from distllm.config.schema import CheckpointConfig

LOCK = ".lock"
LOCK_WAIT_S = 10.0
"""How long a start waits for a process that is about to die, as after a restart by a launcher."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}  # file systems mounted without locks


def hold(folder: Path, *, wait_s: float = LOCK_WAIT_S) -> int:
    """Take the folder for this process, until it ends; the kernel lets go of it whatever way it ends.

    Args:
        folder: of checkpoints.
        wait_s: seconds to wait for another process to let go.

    Returns:
        The open file that holds the lock.

    Raises:
        CheckpointError: another live process has it.
        OSError: the folder cannot be written.
    """
    # A lock of POSIX's kind, not flock's: it is not inherited by forked data workers that outlive us, and NFS knows it.
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return fd
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                os.close(fd)
                raise
        if time.monotonic() > deadline:
            os.close(fd)
            raise CheckpointError(f"{folder}: another live process trains this run; stop it, or give this run another name")
        time.sleep(0.05)


def tidy(folder: Path, *, logger: logging.Logger) -> None:
    """Remove what a dead attempt left unfinished, and finish a second writing of a step between its two renames.

    Args:
        folder: of checkpoints; the caller holds it, so nobody is writing there.
        logger: told of bad checkpoints.
    """
    for name in os.listdir(folder):
        if name.startswith((".tmp-step-", ".trash-")):
            shutil.rmtree(folder / name, ignore_errors=True)
        elif name.startswith(f".{BEST}-"):
            (folder / name).unlink(missing_ok=True)
    for _, new in candidates(folder):
        if new.suffix != ".new":
            continue
        try:
            check(new)
        except NewerFormat:
            continue
        except CheckpointError as error:
            set_aside(new, error, logger=logger)
            continue
        old = new.with_suffix("")
        if old.exists():
            discard(old, tag="replaced")
        os.rename(new, old)
        sync_folder(folder)


def retire(
    folder: Path, *, config: CheckpointConfig, just_written: str, good: set[str], tag: str, logger: logging.Logger
) -> None:
    """Delete the checkpoints that nobody asked to keep; only when `keep` newer good ones are there.

    The one that the link `best` names stays too.

    Args:
        folder: of checkpoints; the caller holds it.
        config: `keep` newest good ones stay, and multiples of `keep_every` steps.
        just_written: the name of the newest writing, which stays even when others have a later step.
        good: names known to verify; those checked here are added.
        tag: makes the names of the trash unique.
        logger: told of bad checkpoints.
    """
    counted, best = 0, linked(folder / BEST)
    newest = folder / just_written
    for step, path in [(0, newest), *[c for c in candidates(folder) if c[1] != newest]]:
        if counted >= config.keep:
            if path != best and not (config.keep_every and step % config.keep_every == 0):
                discard(path, tag=tag)
                good.discard(path.name)
            continue
        try:
            if path.name in good:
                check_sizes(path)  # it was checked to the last bit when it was written or found
            else:
                check(path)
        except NewerFormat:
            continue
        except CheckpointError as error:
            set_aside(path, error, logger=logger)
            continue
        good.add(path.name)
        counted += 1


def link_best(target: Path, *, known_good: bool, tag: str) -> None:
    """Let the link `best` beside a checkpoint name it, in one rename: a reader sees the old link or the new one.

    Args:
        target: a checkpoint that has been put in place.
        known_good: whether it was checked to the last bit, when it was written or found.
        tag: makes the name of the link unique until it is in place.

    Raises:
        CheckpointError: the checkpoint is not whole; the link is as it was.
        OSError: the link cannot be made.
    """
    if known_good:
        check_sizes(target)
    else:
        check(target)
    best = target.with_name(BEST)
    if linked(best) == target:
        return
    new = target.with_name(f".{BEST}-{tag}")
    os.symlink(target.name, new, target_is_directory=True)  # relative: the run folder may be moved
    os.rename(new, best)
    sync_folder(target.parent)


def set_aside(folder: Path, problem: BaseException | None, *, logger: logging.Logger) -> None:
    """Name a bad checkpoint in the log and rename it to `bad-...`, so that it is looked at once and never counted.

    One that could not be read (an input/output error, no permission) may be good: it is named and left where it is.
    """
    if isinstance(problem, OSError):
        logger.warning("%s: cannot be read (%s); passed over", problem.filename or folder, problem.strerror or problem)
        return
    number, bad = 1, folder.with_name(f"bad-{folder.name}")
    while bad.exists():
        number += 1
        bad = folder.with_name(f"bad-{folder.name}-{number}")
    try:
        os.rename(folder, bad)
        sync_folder(folder.parent)
    except OSError as error:
        logger.warning("bad checkpoint: %s; it could not be renamed (%s)", problem, error.strerror)
        return
    logger.warning("bad checkpoint: %s; set aside as %s", problem, bad.name)
