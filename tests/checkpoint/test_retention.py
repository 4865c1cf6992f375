from __future__ import annotations

import contextlib
import os
import random
import shutil
from pathlib import Path

import pytest

from distllm.checkpoint import commit, durable, retention, sharded
from distllm.checkpoint import manager as manager_module
from distllm.checkpoint.find import candidates, check
from distllm.config.errors import CheckpointError
from tests.checkpoint.conftest import LOGGER, die_at, died, fork, manager, names, save, write_two


def test_the_newest_and_the_milestones_stay(folder: Path) -> None:
    kept = manager(folder, keep=2, keep_every=10)
    for step in range(5, 45, 5):
        save(kept, step)
    kept.wait()
    assert names(folder) == ["step-10", "step-20", "step-30", "step-35", "step-40"]


def test_a_bad_one_is_not_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = manager(folder, keep=2)
    for step in (1, 2):
        save(kept, step)
    kept.wait()
    (folder / "step-2" / "rank-00000.safetensors").write_bytes(b"")
    again = manager(folder, attempt="b", keep=2)
    save(again, 3)
    again.wait()
    assert names(folder) == ["bad-step-2", "step-1", "step-3"]
    assert "step-2/rank-00000.safetensors: 0 bytes" in caplog.text


def test_what_was_just_written_stays_beside_later_steps(folder: Path) -> None:
    kept = manager(folder, keep=2)
    for step in (8, 9, 3):
        save(kept, step)
    kept.wait()
    assert names(folder) == ["step-3", "step-9"]


def test_no_deletion_ever_leaves_less_than_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves at random steps, restarts and random damage; looked at in the moment of every deletion."""
    numbers, keep, deletions = random.Random(3), 2, []

    def watched(path: Path, *, tag: str) -> None:
        durable.discard(path, tag=tag)
        good = 0
        for _, other in candidates(folder):
            with contextlib.suppress(CheckpointError):
                good += check(other) is not None
        assert good >= keep
        deletions.append(path.name)

    monkeypatch.setattr(retention, "discard", watched)
    kept = manager(folder, keep=keep)
    step = 0
    for turn in range(60):
        step += numbers.randrange(1, 4)
        save(kept, step)
        kept.wait()
        if numbers.random() < 0.3:
            victim = numbers.choice(candidates(folder))[1] / "rank-00000.json"
            victim.write_bytes(victim.read_bytes()[:-1])
        if numbers.random() < 0.4:
            kept = manager(folder, attempt=f"turn-{turn}", keep=keep)
            found = kept.newest()
            step = found.step if found else 0
    assert len(deletions) > 10


def test_with_one_kept_the_previous_stays_until_the_new_one_is_in_place_and_verifies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = manager(folder, keep=1)
    save(kept, 1)
    kept.wait()
    seen = []
    real_write = sharded.write_rank

    def write_rank(*args, **kwargs):  # type: ignore[no-untyped-def]
        record = real_write(*args, **kwargs)
        seen.append(("written", [check(path).step for _, path in candidates(folder)]))
        return record

    def watched(path: Path, *, tag: str) -> None:
        seen.append(("deletes", [check(path).step for _, path in candidates(folder)]))
        durable.discard(path, tag=tag)

    monkeypatch.setattr(sharded, "write_rank", write_rank)
    monkeypatch.setattr(retention, "discard", watched)
    save(kept, 2)
    kept.wait()
    assert seen == [("written", [1]), ("deletes", [2, 1])], "two good ones in the moment of the deletion"
    assert names(folder) == ["step-2"]


def test_with_one_kept_a_new_one_that_is_torn_does_not_cost_the_previous(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = manager(folder, keep=1)
    save(kept, 1)
    kept.wait()
    real = commit._put_in_place

    def torn(save_: commit.Save) -> None:
        real(save_)
        (save_.target / "rank-00000.safetensors").write_bytes(b"")

    monkeypatch.setattr(commit, "_put_in_place", torn)
    save(kept, 2)
    kept.wait()
    assert names(folder) == ["bad-step-2", "step-1"] and "step-2/rank-00000.safetensors: 0 bytes" in caplog.text


def test_with_one_kept_a_kill_at_any_system_call_leaves_a_good_one(tmp_path: Path) -> None:
    call, killed, old_alone, both = 0, True, 0, 0
    base = tmp_path / "base"
    before = manager(base, keep=1)
    save(before, 1)
    before.wait()
    while killed:
        folder = tmp_path / f"killed-{call}"
        shutil.copytree(base, folder)

        def child(folder: Path = folder, call: int = call) -> None:
            kept = manager(folder, attempt="dies", keep=1)
            die_at(call)
            save(kept, 2)
            kept.wait()

        killed = died(fork(child))
        good = [check(path).step for _, path in candidates(folder)]
        assert good in ([1], [2, 1], [2])
        old_alone, both, call = old_alone + (good == [1]), both + (good == [2, 1]), call + 1
    assert good == [2] and old_alone > 5 and both > 0


def test_a_deletion_that_fails_does_not_fail_the_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = manager(folder, keep=1)
    save(kept, 1)
    kept.wait()

    def refused(path: Path, *, tag: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(retention, "discard", refused)
    save(kept, 2)
    kept.wait()
    assert names(folder) == ["step-1", "step-2"] and "could not be deleted" in caplog.text


def test_what_dead_attempts_left_is_removed_and_nothing_else(folder: Path) -> None:
    write_two(folder)
    for name in (".tmp-step-9-dead-1", ".trash-step-3-dead-1", "bad-step-4", "mine"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    manager(folder)
    assert names(folder) == ["bad-step-4", "mine", "step-1"]


def test_a_live_attempt_keeps_its_files_and_its_folder(folder: Path) -> None:
    folder.mkdir()
    reader, writer = os.pipe()
    stop_reader, stop_writer = os.pipe()

    def child() -> None:
        retention.hold(folder)
        (folder / ".tmp-step-1-live-1").mkdir()
        os.write(writer, b"1")
        os.read(stop_reader, 1)

    live = fork(child)
    os.read(reader, 1)
    with pytest.raises(CheckpointError, match="another live process trains this run"):
        retention.hold(folder, wait_s=0.0)
    assert names(folder) == [".tmp-step-1-live-1"]
    os.write(stop_writer, b"1")
    retention.hold(folder)  # waits for a process that is on its way out
    assert not died(live)
    for fd in (reader, writer, stop_reader, stop_writer):
        os.close(fd)


def test_a_lock_is_not_inherited_by_a_forked_worker_that_outlives_the_run(folder: Path) -> None:
    folder.mkdir()
    stop_reader, stop_writer = os.pipe()
    told_reader, told_writer = os.pipe()

    def run() -> None:
        retention.hold(folder)
        worker = fork(lambda: os.read(stop_reader, 1))
        os.write(told_writer, worker.to_bytes(4, "little"))

    assert not died(fork(run))
    assert os.read(told_reader, 4)
    os.close(retention.hold(folder, wait_s=0.0))
    os.write(stop_writer, b"1")
    for fd in (stop_reader, stop_writer, told_reader, told_writer):
        os.close(fd)


def test_a_bad_second_writing_does_not_replace_a_good_first(folder: Path) -> None:
    write_two(folder, step=5)
    new = folder / "step-5.new"
    os.rename(folder / "step-5", new)
    write_two(folder, step=5)
    (new / "config.yaml").unlink()
    manager(folder)
    assert names(folder) == ["bad-step-5.new", "step-5"]


def test_quarantine_never_overwrites_and_spares_what_could_not_be_read(folder: Path) -> None:
    for number in range(3):
        write_two(folder, step=5)
        retention.set_aside(folder / "step-5", CheckpointError("torn"), logger=LOGGER)
        assert len(names(folder)) == number + 1
    write_two(folder, step=5)
    retention.set_aside(folder / "step-5", OSError(5, "Input/output error", "x"), logger=LOGGER)
    assert "step-5" in names(folder)
    assert manager_module.retire is retention.retire
