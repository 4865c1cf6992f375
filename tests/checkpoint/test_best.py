"""The link to the best checkpoint: it names a whole one at every moment, and that one stays."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from distllm.checkpoint import commit
from distllm.checkpoint.find import candidates, check, find
from distllm.comm import World
from distllm.config.errors import CheckpointError
from tests.checkpoint.conftest import (
    ABOUT,
    LOGGER,
    die_at,
    died,
    fork,
    manager,
    names,
    save,
    two_rank_chunks,
    write_two,
)
from tests.ranks import on_ranks


def test_the_best_stays_and_the_link_leads_to_its_folder(folder: Path) -> None:
    kept = manager(folder, keep=1, keep_every=50)
    for step in (10, 20, 30, 40, 50, 60):
        save(kept, step)
        if step in (10, 30):
            kept.mark_best(step)
    kept.wait()
    assert names(folder) == ["best", "step-30", "step-50", "step-60"]
    assert os.readlink(folder / "best") == "step-30"
    for path in (folder / "best", Path(os.path.relpath(folder)) / "best"):
        found = find(path, logger=LOGGER)
        assert found.step == 30 and found.folder == path.parent / "step-30"
    assert kept.find(folder / "best").folder.parent.parent == folder.parent
    assert kept.newest().step == 60 and find(folder.parent, logger=LOGGER).step == 60
    moved = folder.parent.with_name("moved")
    os.rename(folder.parent, moved)
    assert find(moved / "checkpoints" / "best", logger=LOGGER).step == 30


def test_the_one_before_goes_at_once_and_naming_it_twice_changes_nothing(folder: Path) -> None:
    kept = manager(folder, keep=1)
    for step in (1, 2):
        save(kept, step)
        kept.mark_best(step)
        kept.mark_best(step)
        kept.wait()
    assert names(folder) == ["best", "step-2"] and os.readlink(folder / "best") == "step-2"
    again = manager(folder, attempt="b", keep=1)  # another attempt knows it too
    save(again, 3)
    save(again, 4)
    again.wait()
    assert names(folder) == ["best", "step-2", "step-4"]


def test_the_link_is_made_only_when_the_checkpoint_has_landed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = manager(folder)
    save(kept, 1)
    kept.mark_best(1)
    kept.wait()
    may_go, real = threading.Event(), commit._put_in_place

    def slow(save_: commit.Save) -> None:
        assert may_go.wait(20.0)
        assert os.readlink(folder / "best") == "step-1"
        real(save_)

    monkeypatch.setattr(commit, "_put_in_place", slow)
    save(kept, 2)
    kept.mark_best(2)  # waits for nothing
    assert os.readlink(folder / "best") == "step-1"
    may_go.set()
    kept.wait()
    assert os.readlink(folder / "best") == "step-2"


def test_a_checkpoint_that_did_not_land_or_is_torn_is_not_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = manager(folder)
    save(kept, 1)
    kept.mark_best(1)
    kept.wait()

    def full(save_: commit.Save) -> None:
        raise OSError(28, "No space left on device", str(save_.temporary))

    monkeypatch.setattr(commit, "_put_in_place", full)
    save(kept, 2)
    kept.mark_best(2)
    with pytest.raises(ValueError, match="No space left"):
        kept.wait()
    assert os.readlink(folder / "best") == "step-1" and "could not be made to name step-2" in caplog.text
    monkeypatch.undo()
    save(kept, 3)
    kept.wait()
    (folder / "step-3" / "rank-00000.safetensors").write_bytes(b"")
    kept.mark_best(3)
    kept.wait()
    assert find(folder / "best", logger=LOGGER).step == 1 and "rank-00000.safetensors: 0 bytes" in caplog.text


def test_a_kill_at_any_system_call_leaves_the_old_link_or_the_new_one(tmp_path: Path) -> None:
    base = tmp_path / "base"
    before = manager(base, keep=1)
    save(before, 1)
    before.mark_best(1)
    before.wait()
    call, killed, seen = 0, True, []
    while killed:
        folder = tmp_path / f"killed-{call}"
        shutil.copytree(base, folder, symlinks=True)

        def child(folder: Path = folder, call: int = call) -> None:
            kept = manager(folder, attempt="dies", keep=1)
            die_at(call)
            save(kept, 2)
            kept.mark_best(2)
            kept.wait()

        killed = died(fork(child))
        seen.append(find(folder / "best", logger=LOGGER).step)
        again = manager(folder, attempt="lives", keep=1)
        assert set(names(folder)) <= {"best", "step-1", "step-2"}, "what the dead one left is gone"
        assert again.find(folder / "best").step == seen[-1]
        call += 1
    assert seen == sorted(seen) and seen.count(1) > 10 and seen.count(2) > 3, "each step of linking was struck"
    assert names(folder) == ["best", "step-2"]


def test_a_kill_while_the_best_step_is_written_again_leaves_it_readable(tmp_path: Path) -> None:
    base = tmp_path / "base"
    before = manager(base)
    save(before, 1)
    before.mark_best(1)
    before.wait()
    call, killed, by_the_new = 0, True, 0
    while killed:
        folder = tmp_path / f"killed-{call}"
        shutil.copytree(base, folder, symlinks=True)

        def child(folder: Path = folder, call: int = call) -> None:
            kept = manager(folder, attempt="dies")
            die_at(call)
            save(kept, 1, version=7)
            kept.wait()

        killed = died(fork(child))
        found = find(folder / "best", logger=LOGGER)
        assert found.step == 1
        by_the_new += found.folder.name == "step-1.new"
        assert manager(folder, attempt="lives").find(folder / "best").folder == folder / "step-1"
        call += 1
    assert by_the_new > 0


def test_a_link_to_what_is_gone_is_one_clear_line(folder: Path) -> None:
    write_two(folder, step=1)
    os.symlink("step-9", folder / "best")
    for path in (folder / "best", folder / "none"):
        with pytest.raises(CheckpointError) as raised:
            find(path, logger=LOGGER)
        assert str(raised.value).startswith(f"{folder}/{'step-9' if path.name == 'best' else 'none'}")
    kept = manager(folder)
    kept.mark_best(1)
    kept.wait()
    assert find(folder / "best", logger=LOGGER).step == 1
    (folder / "step-1" / "config.yaml").write_text("name: ran\n")
    with pytest.raises(CheckpointError, match=r"^[^ ]*step-1/config\.yaml: changed"):  # the one asked for, and no other
        find(folder / "best", logger=LOGGER)


def test_a_file_system_without_links_costs_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted", str(folder / "best"))

    monkeypatch.setattr(os, "symlink", refused)
    kept = manager(folder)
    save(kept, 1)
    kept.mark_best(1)
    kept.wait()
    assert names(folder) == ["step-1"] and "Operation not permitted" in caplog.text


def test_all_ranks_mark_and_one_links(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"

    def rank(world: World) -> int:
        kept = manager(folder, world=world, keep=1)
        for step in (1, 2, 3):
            kept.save(step, two_rank_chunks(world.rank, step), rng={}, **ABOUT)
            if step == 2:
                kept.mark_best(step)
        kept.wait()
        return kept.find(folder / "best").step

    assert on_ranks(rank, 2, tmp_path) == [2, 2]
    assert [check(path).step for _, path in candidates(folder)] == [3, 2]
