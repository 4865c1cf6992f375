"""Which folder is a checkpoint, and what is in it; reads only, in one process, without a process group."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distllm.checkpoint import sharded
from distllm.checkpoint.manifest import MANIFEST, Manifest, NewerFormat, check_files, plain_file, read_manifest
from distllm.config.errors import CheckpointError

BEST = "best"
"""The name, in a folder of checkpoints, of the symbolic link to the best one."""
AVERAGES = "ema."
"""What the names of averaged weights begin with, where those of weights begin with `model.`."""

_STEP = re.compile(r"step-(0|[1-9]\d*)(\.new)?")
_HASHERS = 4  # threads; hashlib lets go of the interpreter


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every file was checked."""

    folder: Path
    step: int
    manifest: Manifest


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a folder of checkpoints."""
    return folder / f"step-{step}"


def candidates(folder: Path) -> list[tuple[int, Path]]:
    """The folders that could be checkpoints, newest step first; nothing of them is checked.

    `step-N.new` comes before `step-N`: it is a complete second writing of the step, caught between its two renames.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(int(m[1]), bool(m[2]), folder / n) for n in names if (m := _STEP.fullmatch(n))]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def check_sizes(folder: Path) -> None:
    """Check a checkpoint's manifest, and of its files only that they are there in full: quick, and blind to a flipped bit.

    Raises:
        CheckpointError: names the file that is missing, torn, or, of the manifest, changed.
        OSError: a file cannot be looked at.
    """
    for name, record in read_manifest(folder).files.items():
        size = plain_file(folder, name).lstat().st_size
        if size != record.size:
            raise CheckpointError(f"{folder / name}: {size} bytes, and {record.size} were written: the file is torn")


def check(folder: Path) -> Found:
    """Check every file of one checkpoint.

    Raises:
        CheckpointError: names the file that is missing, torn or changed, and why.
    """
    try:
        manifest = read_manifest(folder)
        with ThreadPoolExecutor(_HASHERS) as pool:
            list(pool.map(lambda name: list(check_files(folder, manifest.files, [name])), sorted(manifest.files)))
    except OSError as error:
        raise unreadable(error, folder=folder) from error
    return Found(folder, manifest.step, manifest)


def find(path: Path, *, logger: logging.Logger) -> Found:
    """The checkpoint that a path means: a checkpoint folder, a link to one, a run folder, or its folder of checkpoints.

    Args:
        path: an explicit checkpoint must be good; of a run the newest good checkpoint is taken. A link is followed, so
            that `.folder` is where the checkpoint really lies.
        logger: told of each bad checkpoint of a run that is passed over.

    Raises:
        CheckpointError: there is none, or the one asked for is torn or changed; names the file.
    """
    return first_good(path, meant(path), check=check, logger=logger)


def meant(path: Path) -> list[Path]:
    """The folders that a path may mean, first choice first: itself if it is a checkpoint folder, else a run's newest first.

    Raises:
        CheckpointError: there is none; whether one is good is not looked at.
    """
    target = linked(path)
    if target is not None and _STEP.fullmatch(target.name):
        # Between the two renames of a second writing only `step-N.new` is there, and readers prefer it while it is.
        return [folder for folder in (target.with_name(f"{target.name}.new"), target) if folder.exists()] or [target]
    if (path / MANIFEST).exists() or _STEP.fullmatch(path.name):
        return [path]
    several = candidates(path / "checkpoints") or candidates(path)
    if not several:
        kind = "no checkpoint here" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {kind}; give a run folder or a folder checkpoints/step-N")
    return [folder for _, folder in several]


def linked(path: Path) -> Path | None:
    """Where a symbolic link leads, whether or not something is there; None when it is no link."""
    return path.parent / os.readlink(path) if path.is_symlink() else None


def first_good(
    path: Path, folders: Sequence[Path], *, check: Callable[[Path], Found], logger: logging.Logger | None
) -> Found:
    """The first of the folders that `check` lets pass.

    Args:
        path: what was asked for; when it is itself the folder, nothing else will do.
        folders: what `meant` gave.
        check: raises CheckpointError for a bad one.
        logger: told of each bad one that is passed over; None on ranks that say nothing.

    Raises:
        CheckpointError: none is good, or the one asked for is torn or changed; names the file.
    """
    problem: CheckpointError | None = None
    for folder in folders:
        try:
            return check(folder)
        except NewerFormat:
            raise
        except CheckpointError as error:
            if folder == path or folder == linked(path):
                raise
            if logger is not None:
                logger.warning("passing over a bad checkpoint: %s", error)
            problem = problem or error
    raise CheckpointError(f"{path}: none of its {len(folders)} checkpoints is good; the newest: {problem}")


def unreadable(error: OSError, *, folder: Path) -> CheckpointError:
    """The one line for a file of a checkpoint that the operating system does not let us read."""
    return CheckpointError(f"{error.filename or folder}: cannot be read ({error.strerror or error})")


def read_facts(found: Found) -> dict[str, Any]:
    """What the run wrote down beside its tensors."""
    return dict(found.manifest.facts)


def read_weights(found: Found) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a checkpoint's model answers with: the moving averages where it has them, else as trained.

    Whole, by the model's own names, one at a time on the CPU; with the persistent buffers.
    """
    tensors = found.manifest.tensors
    names = [name.removeprefix("model.") for name in tensors if name.startswith("model.")]
    taken = [AVERAGES + name if AVERAGES + name in tensors else f"model.{name}" for name in names]
    for name, (_, tensor) in zip(names, sharded.read_full(found.folder, found.manifest, taken), strict=True):
        yield name, tensor


def read_full(found: Found, *, names_prefix: str = "model.") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors whose name begins with a prefix, whole and without the prefix, one at a time on the CPU.

    Args:
        found: the checkpoint, written by any number of ranks.
        names_prefix: which part of the state.
    """
    names = [name for name in found.manifest.tensors if name.startswith(names_prefix)]
    for name, tensor in sharded.read_full(found.folder, found.manifest, names):
        yield name.removeprefix(names_prefix), tensor
