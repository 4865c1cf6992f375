from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from distllm.checkpoint import commit
from distllm.checkpoint.find import candidates, check
from distllm.checkpoint.sharded import read
from distllm.config.errors import CheckpointError, StorageError
from tests.checkpoint.conftest import (
    ONE,
    blank,
    die_at,
    died,
    equal,
    fork,
    manager,
    names,
    save,
    save_of,
    tensors,
    two_rank_chunks,
    write_two,
)


def holds(folder: Path, version: int) -> bool:
    found = check(folder)
    chunks = blank()
    read(found.folder, found.manifest, chunks)
    return equal(chunks, tensors(version))


@pytest.mark.parametrize(("step", "old"), [(3, None), (2, 2)], ids=["new_step", "step_saved_again"])
def test_kill_before_every_system_call_of_a_save(tmp_path: Path, step: int, old: int | None) -> None:
    """Checkpoints of steps 1 and 2 exist, two are kept; a third save, with version 9 of the values, dies at every point."""
    base = tmp_path / "base"
    before = manager(base)
    for number in (1, 2):
        save(before, number)
    before.wait()
    call, saved_before = 0, 0
    while True:
        folder = tmp_path / f"killed-{call}"
        shutil.copytree(base, folder)

        def child(folder: Path = folder, call: int = call) -> None:
            kept = manager(folder, attempt="dies", keep=2)
            die_at(call)
            save(kept, step, version=9)
            kept.wait()

        killed = died(fork(child))
        seen = [path for _, path in candidates(folder)]
        assert len(seen) >= 2, "there are always two good ones"
        assert all(check(path) for path in seen), "no torn one bears a checkpoint's name"
        # What a start finds, and makes of the folder.
        kept = manager(folder, attempt="next", keep=2)
        assert not [n for n in names(folder) if not n.startswith("step-") or n.endswith(".new")]
        found = kept.newest()
        assert found is not None and found.step >= 2
        new = found.step == step and holds(found.folder, 9)
        assert new or holds(found.folder, 2)
        assert not saved_before or new, "once in place, it stays in place"
        saved_before += new
        shutil.rmtree(folder)
        if not killed:
            break
        call += 1
    assert new and call > 20, "every point was reached, the last child lived"
    assert saved_before > 3, "it also died after the new one was in place"


def test_kill_one_of_two_ranks_before_every_system_call(tmp_path: Path) -> None:
    """Rank 1 dies: rank 0 waits in vain and makes no checkpoint. Rank 0 dies: there is a whole checkpoint or none."""
    for victim in (0, 1):
        call, killed, made = 0, True, 0
        while killed:
            folder = tmp_path / f"{victim}-{call}"
            write_two(folder, step=1)

            def child(rank: int, folder: Path = folder, call: int = call, victim: int = victim) -> None:
                if rank == victim:
                    die_at(call)
                timeout_s = 0.05 if victim == 1 else 20.0
                try:
                    commit.write(save_of(folder, rank=rank, size=2, step=2, timeout_s=timeout_s), two_rank_chunks(rank, 2), {})
                except CheckpointError:
                    assert rank != victim

            children = [0, 0]
            children[1] = fork(lambda: child(1))
            if victim == 1:
                killed = died(children[1])
            children[0] = fork(lambda: child(0))
            if victim == 0:
                assert not died(children[1])
                killed = died(children[0])
            else:
                assert not died(children[0])
            seen = [path.name for _, path in candidates(folder)]
            assert seen[-1] == "step-1" and all(check(folder / name) for name in seen)
            complete = len(seen) == 2
            if victim == 1 and killed:
                record_is_there = complete  # it may die after its last call that counts, when all is written
                assert not record_is_there or holds(folder / "step-2", 2)
            made += complete
            call += 1
        assert made and call > 8


def full_disk_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    left, real = [calls], os.write

    def write(fd: int, data: memoryview) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("calls", range(10))
def test_a_full_disk_is_told_and_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    kept = manager(folder)
    for step in (1, 2):
        save(kept, step)
    kept.wait()
    before = names(folder)
    full_disk_after(monkeypatch, calls)
    save(kept, 3)
    if calls >= 9:
        kept.wait()
        return
    with pytest.raises(StorageError, match=r"No space left on device while writing the checkpoint of step 3") as raised:
        kept.wait()
    assert "\n" not in str(raised.value)
    assert names(folder) == before and holds(folder / "step-2", 2)
    monkeypatch.undo()
    save(kept, 3)
    kept.wait()
    assert holds(folder / "step-3", 3)


def test_a_file_size_limit_is_told_and_loses_nothing(folder: Path) -> None:
    def child() -> None:
        kept = manager(folder)
        save(kept, 1)
        kept.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save(kept, 2)
        with pytest.raises(StorageError, match="File too large"):
            kept.wait()

    assert not died(fork(child))
    assert names(folder) == ["step-1"] and holds(folder / "step-1", 1)


def test_a_rank_that_fails_leaves_word_so_that_rank_0_does_not_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    full_disk_after(monkeypatch, 1)
    with pytest.raises(StorageError, match="No space left"):
        commit.write(save_of(folder, rank=1, size=2), two_rank_chunks(1, 1), {})
    monkeypatch.undo()
    (folder / ".tmp-step-1-t" / ".rank-00001.failed.part").unlink(missing_ok=True)
    with pytest.raises(OSError, match="No such file"):  # the disk was too full even for the word
        (folder / ".tmp-step-1-t" / "rank-00001.failed").read_text()
    shutil.rmtree(folder / ".tmp-step-1-t")
    (folder / ".tmp-step-1-t").mkdir()
    (folder / ".tmp-step-1-t" / "rank-00001.safetensors").touch()  # then rank 1 cannot create its file
    with pytest.raises(StorageError, match="File exists"):
        commit.write(save_of(folder, rank=1, size=2), two_rank_chunks(1, 1), {})
    with pytest.raises(StorageError, match=r"rank 1: .*rank-00001\.safetensors: File exists"):
        commit.write(save_of(folder, rank=0, size=2, timeout_s=60.0), two_rank_chunks(0, 1), {})
    assert names(folder) == []


def test_ranks_that_do_not_come_are_named(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"no files of rank 1, 2, 3, 4, 5 \.\.\. within 0 s"):
        commit.write(save_of(folder, rank=0, size=8, timeout_s=0.02), two_rank_chunks(0, 1), {})
    assert names(folder) == []


def test_rank_0_waits_for_a_slow_rank_without_a_collective(folder: Path) -> None:
    folder.mkdir()
    first = threading.Thread(
        target=commit.write, args=(save_of(folder, rank=0, size=2), two_rank_chunks(0, 1), {"torch": torch.zeros(1)})
    )
    first.start()
    commit.write(save_of(folder, rank=1, size=2), two_rank_chunks(1, 1), {"torch": torch.ones(1)})
    first.join()
    assert holds(folder / "step-1", 1)
    assert ONE.size == 1
