"""Writing that is on the disk when it says so, and removing that no reader sees half done.

Only `os` calls, so that a test can end the process at each one of them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.config.errors import StorageError

BLOCK = 8 << 20
"""Bytes handed to the kernel and the digest at a time: small enough to stay in the cache between the two."""

_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP}  # file systems without fsync on this kind of file (pytorch#144752)


@dataclass(frozen=True)
class FileRecord:
    """What a file must be to be believed."""

    size: int
    """Bytes."""
    sha256: str
    """Hex digest of the whole file."""


def write_file(path: Path, parts: Iterable[Any]) -> FileRecord:
    """Write a new file and bring it to the disk; the digest is taken from the memory that is written, not read back.

    Args:
        path: a file that does not exist.
        parts: its content, one buffer (bytes or a contiguous array) after another.

    Returns:
        Its size and digest.

    Raises:
        OSError: it exists, or the disk or a limit does not let it be written.
    """
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            size += len(view)
            for start in range(0, len(view), BLOCK):
                block = view[start : start + BLOCK]
                digest.update(block)
                while block:
                    block = block[os.write(fd, block) :]
        _fsync(fd)
    finally:
        os.close(fd)
    return FileRecord(size, digest.hexdigest())


def write_whole(path: Path, content: bytes) -> FileRecord:
    """Write a file that others look for: it appears under its name only when it is complete and on the disk."""
    hidden = path.with_name(f".{path.name}.part")
    record = write_file(hidden, [content])
    os.rename(hidden, path)
    return record


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (new and renamed files) to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def discard(folder: Path, *, tag: str) -> None:
    """Delete a checkpoint so that a reader sees it whole or not at all: first a rename, then the deletion.

    Args:
        folder: the checkpoint folder.
        tag: makes the name of the trash unique; what a crash leaves of it is removed at the next start.
    """
    trash = folder.with_name(f".trash-{folder.name}-{tag}")
    os.rename(folder, trash)
    sync_folder(folder.parent)
    shutil.rmtree(trash, ignore_errors=True)


def storage_error(error: OSError, *, doing: str, path: Path) -> StorageError:
    """The one line for what the disk did not let us do.

    Args:
        error: what the operating system said.
        doing: what was being done, such as "writing the checkpoint of step 500".
        path: where, when the error does not name a file.
    """
    where = error.filename or path
    reason = error.strerror or str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "free space there or lower checkpoint.keep" if full else "make it writable"
    return StorageError(
        f"{where}: {reason} while {doing}; earlier checkpoints are untouched; {advice}, then run the same command again"
    )


def _fsync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
