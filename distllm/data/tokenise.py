"""What a worker does: one shard of text into one part of a store. Imports neither torch nor transformers: workers start fast."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distllm.config.errors import DataError
from distllm.config.machine import cores
from distllm.data.documents import documents
from distllm.data.encode import cached_encoder
from distllm.data.source import Shard

ONE_PROCESS_BYTES = 24 << 20  # below it starting workers (about 1 s) costs more than they save


@dataclass(frozen=True)
class Task:
    """A shard and where its part goes: `part.bin`, ids, and `part.npy`, the documents' lengths, which appears last."""

    shard: Shard
    part: Path
    tokenizer: Path
    tokenizer_digest: str
    dtype: np.dtype
    fast: bool

    @property
    def done(self) -> bool:
        """Whether the part is whole, from this run or one that was killed."""
        return lengths_path(self.part).is_file()


def ids_path(part: Path) -> Path:
    """The ids of a part."""
    return part.with_name(part.name + ".bin")


def lengths_path(part: Path) -> Path:
    """The lengths of a part's documents in tokens, int64."""
    return part.with_name(part.name + ".npy")


def tokenise(task: Task) -> int:
    """Write the part of one shard and return its number of tokens.

    Raises:
        DataError: the shard cannot be read as text.
        OSError: the disk is full, or the like; the part is then not there.
    """
    encoder = cached_encoder(task.tokenizer, task.tokenizer_digest, task.fast)
    end = np.array([encoder.eos_id], dtype=task.dtype)
    lengths: list[int] = []
    staging = [p.with_name(f"{p.name}.{os.getpid()}.tmp") for p in (ids_path(task.part), lengths_path(task.part))]
    try:
        with staging[0].open("wb") as file:
            for text in documents(task.shard):
                ids = encoder.encode(text).astype(task.dtype)
                file.write(ids.tobytes())
                file.write(end.tobytes())
                lengths.append(len(ids) + 1)
            if task.shard.unfinished and lengths:  # the document goes on in the next shard
                file.truncate(file.tell() - end.nbytes)
                lengths[-1] -= 1
        with staging[1].open("wb") as file:
            np.save(file, np.array(lengths, dtype=np.int64))
        staging[0].replace(ids_path(task.part))
        staging[1].replace(lengths_path(task.part))
    finally:
        for path in staging:
            path.unlink(missing_ok=True)
    return sum(lengths)


def tokenise_all(tasks: Sequence[Task], *, workers: int) -> Iterator[Task]:
    """Tokenise the tasks that are not done, in this process or in `workers` others, and yield each when it is done.

    The processes are spawned, because the caller may have threads (torch's, tokenizers') that do not survive a fork.

    Raises:
        DataError: as in `tokenise`, or a worker died.
    """
    todo = [t for t in tasks if not t.done]
    size = sum(t.shard.n_bytes for t in todo)
    workers = min(workers or cores(), len(todo))
    if workers <= 1 or 0 < size < ONE_PROCESS_BYTES:
        for task in todo:
            tokenise(task)
            yield task
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_die_with_parent)
    try:
        yield from _feed(pool, todo, 2 * workers)
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process was killed, most likely for want of memory; set data.workers lower (what is done is kept)"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _feed(pool: ProcessPoolExecutor, todo: Sequence[Task], ahead: int) -> Iterator[Task]:
    """Keep `ahead` tasks in the pool, so that millions of shards need no memory."""
    waiting: dict[Future[int], Task] = {}
    rest = iter(todo)
    while True:
        for task in rest:
            waiting[pool.submit(tokenise, task)] = task
            if len(waiting) >= ahead:
                break
        if not waiting:
            return
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            task = waiting.pop(future)
            future.result()
            yield task


def _die_with_parent() -> None:
    """End this worker when the process that started it is killed: a pool's workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
