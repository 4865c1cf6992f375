"""One rank's part in writing a checkpoint, and the step by which rank 0 makes it one. Enters no collective."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distllm.checkpoint import sharded
from distllm.checkpoint.chunk import Chunk
from distllm.checkpoint.durable import FileRecord, discard, storage_error, sync_folder, write_file, write_whole
from distllm.checkpoint.find import step_folder
from distllm.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    Manifest,
    RankRecord,
    manifest_json,
    parse_record,
    rank_file,
    record_file,
    record_json,
    uncovered,
)
from distllm.config.errors import CheckpointError, StorageError


@dataclass(frozen=True)
class Save:
    """One save of one rank: everything but the tensors."""

    folder: Path
    """The run's folder of checkpoints."""
    step: int
    tag: str
    """Names this save among all, the same on every rank."""
    rank: int
    world_size: int
    timeout_s: float
    """Seconds that rank 0 waits for the other ranks' files."""
    facts: dict[str, Any]
    layout: dict[str, Any]
    config_yaml: str
    config_digest: str

    @property
    def temporary(self) -> Path:
        """Where all ranks write."""
        return self.folder / f".tmp-step-{self.step}-{self.tag}"

    @property
    def target(self) -> Path:
        """Where the checkpoint will be."""
        return step_folder(self.folder, self.step)


def write(save: Save, chunks: Mapping[str, Chunk], rng: Mapping[str, torch.Tensor]) -> None:
    """Write this rank's files; on rank 0 wait for the others and put the checkpoint in place.

    Args:
        save: the same on all ranks, but for the rank.
        chunks: this rank's state by name; nobody changes it meanwhile.
        rng: this rank's random-number states by name.

    Raises:
        StorageError: the disk is full or the folder cannot be written, here or on a rank that says so.
        CheckpointError: the files of other ranks did not come in time.
    """
    temporary = save.temporary
    try:
        temporary.mkdir(exist_ok=True)
        record = sharded.write_rank(temporary, rank=save.rank, chunks=chunks, rng=rng)
        write_whole(temporary / record_file(save.rank), record_json(record))
        if save.rank == 0:
            _commit(save)
    except BaseException as error:
        if not isinstance(error, OSError):
            _give_up(save, error)
            raise
        told = storage_error(error, doing=f"writing the checkpoint of step {save.step}", path=temporary)
        _give_up(save, told)
        raise told from error


def _give_up(save: Save, error: BaseException) -> None:
    """Remove what was written; a rank above 0 also leaves word, so that rank 0 does not wait for it."""
    if save.rank == 0:
        shutil.rmtree(save.temporary, ignore_errors=True)
        return
    with contextlib.suppress(OSError):  # without the word, rank 0 times out
        (save.temporary / rank_file(save.rank)).unlink(missing_ok=True)  # on a full disk this makes room for the word
        write_whole(save.temporary / _failure_file(save.rank), str(error).encode())


def _commit(save: Save) -> None:
    _await_ranks(save)
    records, files = _read_records(save)
    tensors = sharded.merge(records)
    for name, tensor in tensors.items():
        hole = uncovered(tensor)
        assert hole is None, f"the ranks' chunks of {name} do not make a whole: {hole}"
    files[CONFIG] = write_file(save.temporary / CONFIG, [save.config_yaml.encode()])
    rng = tuple(record.rng for record in records)
    manifest = Manifest(save.step, save.world_size, save.layout, save.config_digest, save.facts, files, tensors, rng)
    write_file(save.temporary / MANIFEST, [manifest_json(manifest)])
    sync_folder(save.temporary)
    _put_in_place(save)


def _await_ranks(save: Save) -> None:
    """Wait for the records of all ranks, by looking into the folder."""
    missing, pause = set(range(save.world_size)), 0.002
    deadline = time.monotonic() + save.timeout_s
    while True:
        names = set(os.listdir(save.temporary))
        missing = {rank for rank in missing if record_file(rank) not in names}
        for rank in sorted(missing):
            if _failure_file(rank) in names:
                raise StorageError(f"rank {rank}: {(save.temporary / _failure_file(rank)).read_text(errors='replace')}")
        if not missing:
            return
        if time.monotonic() > deadline or not threading.main_thread().is_alive():
            some = ", ".join(map(str, sorted(missing)[:5])) + (" ..." if len(missing) > 5 else "")
            raise CheckpointError(
                f"{save.temporary}: no files of rank {some} within {save.timeout_s:.0f} s in the save of step {save.step}; "
                "see that these ranks live and that all ranks share the folder's file system"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.25)


def _read_records(save: Save) -> tuple[list[RankRecord], dict[str, FileRecord]]:
    records: list[RankRecord] = []
    files: dict[str, FileRecord] = {}
    for rank in range(save.world_size):
        path = save.temporary / record_file(rank)
        content = path.read_bytes()
        records.append(parse_record(content, where=path))
        files[path.name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
        files.update(records[-1].files)
    return records, files


def _put_in_place(save: Save) -> None:
    """The rename from which on the folder is a checkpoint; a step saved before stays until the new one is in place."""
    if save.target.exists():
        second = save.target.with_name(f"{save.target.name}.new")
        os.rename(save.temporary, second)
        sync_folder(save.folder)
        discard(save.target, tag=save.tag)
        os.rename(second, save.target)
    else:
        os.rename(save.temporary, save.target)
    sync_folder(save.folder)


def _failure_file(rank: int) -> str:
    return f"rank-{rank:05d}.failed"
