from __future__ import annotations

import os
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distllm.checkpoint import commit, sharded
from distllm.checkpoint import manager as manager_module
from distllm.checkpoint.chunk import Chunk
from distllm.checkpoint.manifest import to_json
from distllm.comm import World
from distllm.config.errors import CheckpointError, StorageError
from tests.checkpoint.conftest import (
    ABOUT,
    blank,
    chunks_of,
    died,
    equal,
    fork,
    manager,
    names,
    save,
    tensors,
    two_rank_chunks,
)
from tests.checkpoint.test_manifest import rewrite
from tests.ranks import on_ranks


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_without_a_process_group(folder: Path, asynchronous: bool) -> None:
    kept = manager(folder, asynchronous=asynchronous)
    assert kept.newest() is None
    save(kept, 500)
    assert asynchronous or names(folder) == ["step-500"]
    kept.wait()
    found = manager(folder, attempt="b").newest()
    assert found is not None and found.step == 500 and found.folder == folder / "step-500"
    chunks = blank()
    facts, rng = kept.load(found, chunks, layout={"dp_shard": 1})
    assert equal(chunks, tensors(500)) and facts == ABOUT["facts"]
    assert rng is not None and torch.equal(rng["torch"], torch.arange(500, 505, dtype=torch.uint8))
    assert kept.load(found, chunks, layout={"dp_shard": 2})[1] is None, "random numbers belong to a layout"


class Gate:
    """Holds the background write until it is opened, and notes the order of things."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.order = threading.Event(), []
        real_write, real_copy = sharded.write_rank, manager_module.Staging.copy

        def write_rank(*args, **kwargs):  # type: ignore[no-untyped-def]
            assert self.opened.wait(30.0)
            self.order.append("written")
            return real_write(*args, **kwargs)

        def copy(*args):  # type: ignore[no-untyped-def]
            self.order.append("copied")
            return real_copy(*args)

        monkeypatch.setattr(sharded, "write_rank", write_rank)
        monkeypatch.setattr(manager_module.Staging, "copy", copy)


def test_the_state_may_change_as_soon_as_save_returns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    kept = manager(folder)
    values, rng = tensors(1), {"torch": torch.arange(4, dtype=torch.uint8)}
    kept.save(1, chunks_of(values), rng=rng, **ABOUT)
    kept.poll()  # nothing to tell yet, and it does not wait
    for value in (*values.values(), rng["torch"]):
        value.zero_()
    gate.opened.set()
    kept.wait()
    found, chunks = kept.newest(), blank()
    assert found is not None
    _, loaded = kept.load(found, chunks, layout=ABOUT["layout"])
    assert equal(chunks, tensors(1)) and loaded is not None and loaded["torch"].tolist() == [0, 1, 2, 3]


def test_a_second_save_waits_for_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    kept = manager(folder)
    save(kept, 1)
    second = threading.Thread(target=save, args=(kept, 2))
    second.start()
    gate.opened.set()
    second.join()
    kept.wait()
    assert gate.order == ["copied", "written", "copied", "written"]
    assert names(folder) == ["step-1", "step-2"]


def test_buffers_are_kept_from_save_to_save_and_follow_the_layout(folder: Path) -> None:
    kept = manager(folder)
    values = tensors(1)
    kept.reserve(chunks_of(values))
    first = {name: b.data_ptr() for name, b in kept._staging._buffers.items()}
    for step in (1, 2):
        save(kept, step)
        kept.wait()
        assert {name: b.data_ptr() for name, b in kept._staging._buffers.items()} == first
    other = {"model.w": Chunk(torch.ones(2, 2), (2, 2), (0, 0), True)}
    kept.save(3, other, rng={}, **ABOUT)
    kept.wait()
    assert kept._staging._buffers.keys() == other.keys()


@pytest.mark.parametrize("call", ["poll", "wait", "save"])
def test_a_failed_write_is_told_once_at_the_next_call(folder: Path, call: str) -> None:
    kept = manager(folder)
    save(kept, 1)
    kept.wait()
    (folder / ".tmp-step-2-a-2").touch()  # a file where the folder should go
    save(kept, 2)
    assert kept._pending is not None
    kept._pending.exception()  # it is known now
    with pytest.raises(StorageError, match="while writing the checkpoint of step 2"):
        {"poll": kept.poll, "wait": kept.wait, "save": lambda: save(kept, 3)}[call]()
    kept.poll()
    save(kept, 3)
    kept.wait()
    found = kept.newest()
    assert found is not None and found.step == 3


def test_a_bug_of_ours_is_not_called_the_disks_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = manager(folder, asynchronous=False)
    monkeypatch.setattr(commit, "_commit", lambda save: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(kept, 1)
    assert names(folder) == []


def test_facts_that_are_no_json_are_refused_before_anything_is_written(folder: Path) -> None:
    kept = manager(folder)
    with pytest.raises(ValueError, match="JSON"):
        kept.save(1, blank(), rng={}, **{**ABOUT, "facts": {"loss": float("inf")}})
    assert names(folder) == []


def test_a_read_only_folder_is_told_and_loses_nothing() -> None:
    root = Path(tempfile.mkdtemp())  # tmp_path is closed to the user that the child becomes
    root.chmod(0o755)
    folder = root / "checkpoints"
    try:

        def child() -> None:
            if os.getuid() == 0:  # whom no folder's mode stops
                root.chmod(0o777)
                os.setuid(65534)
            kept = manager(folder)
            save(kept, 1)
            kept.wait()
            folder.chmod(0o555)
            save(kept, 2)
            with pytest.raises(StorageError, match="Permission denied while writing the checkpoint of step 2"):
                kept.wait()
            found = kept.newest()
            assert found is not None and found.step == 1
            with pytest.raises(StorageError, match="Permission denied while opening the folder of checkpoints"):
                manager(folder / "inside")

        assert not died(fork(child))
        assert names(folder) == ["step-1"]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(root)


def test_newest_falls_back_names_the_file_and_sets_the_bad_one_aside(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = manager(folder, keep=3)
    for step in (1, 2, 3):
        save(kept, step)
    kept.wait()
    (folder / "step-3" / "manifest.json").unlink()
    path = folder / "step-2" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = kept.newest()
    assert found is not None and found.step == 1
    assert names(folder) == ["bad-step-2", "bad-step-3", "step-1"]
    assert "step-3/manifest.json: missing" in caplog.text
    assert "step-2/rank-00000.safetensors: changed since it was written" in caplog.text
    save(kept, 2)
    kept.wait()
    assert names(folder) == ["bad-step-2", "bad-step-3", "step-1", "step-2"]


def test_a_checkpoint_of_a_later_format_stops_the_run_and_stays(folder: Path) -> None:
    kept = manager(folder)
    save(kept, 1)
    kept.wait()
    rewrite(folder / "step-1", lambda raw: raw.update(format=2))
    with pytest.raises(CheckpointError, match="format 2"):
        kept.newest()
    assert names(folder) == ["step-1"]


def test_two_ranks_save_find_fall_back_and_load(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def run(world: World) -> list[object]:
        kept = manager(folder, world=world, keep=3)
        rng = {"torch": torch.full((3,), world.rank, dtype=torch.uint8)}
        for step in (1, 2, 3):
            kept.save(step, two_rank_chunks(world.rank, step), rng=rng, **ABOUT)
        kept.wait()
        if world.is_main:
            (folder / "step-3" / "rank-00001.json").unlink()
        found = kept.newest()
        assert found is not None
        chunks = {n: replace(c, data=torch.zeros_like(c.data)) for n, c in two_rank_chunks(world.rank, 2).items()}
        facts, rng_back = kept.load(found, chunks, layout=ABOUT["layout"])
        wanted = two_rank_chunks(world.rank, 2)
        assert all(torch.equal(chunks[n].data, wanted[n].data) for n in wanted)
        assert rng_back is not None and torch.equal(rng_back["torch"], rng["torch"]), "each rank has its own"
        return [found.step, kept.find(folder).step, facts]

    assert on_ranks(run, 2, tmp_path / "ranks") == [[2, 2, ABOUT["facts"]]] * 2
    assert names(folder) == ["bad-step-3", "step-1", "step-2"]

    kept = manager(folder, attempt="one")  # and one rank continues
    found, chunks = kept.newest(), blank()
    assert found is not None
    _, rng_back = kept.load(found, chunks, layout=ABOUT["layout"])
    assert equal(chunks, tensors(2)) and rng_back is None


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def run(world: World) -> list[str]:
        told = []
        kept = manager(folder, world=world)
        kept.save(1, two_rank_chunks(world.rank, 1), rng={}, **ABOUT)
        kept.wait()
        if world.rank == 1:
            (folder / ".tmp-step-2-a-2").mkdir()
            (folder / ".tmp-step-2-a-2" / "rank-00001.safetensors").touch()
        torch.distributed.barrier()
        kept.save(2, two_rank_chunks(world.rank, 2), rng={}, **ABOUT)
        with pytest.raises(StorageError) as raised:
            kept.wait()
        told.append(str(raised.value))
        found = kept.newest()
        assert found is not None and found.step == 1
        chunks = two_rank_chunks(world.rank, 1)
        if world.rank == 1:
            chunks["model.w"] = Chunk(torch.zeros(3, 6), (7, 6), (4, 0), True)
        with pytest.raises(CheckpointError) as refused:
            kept.load(found, chunks, layout={})
        told.append(str(refused.value))
        with pytest.raises(CheckpointError) as nowhere:
            kept.find(folder / "step-2")
        told.append(str(nowhere.value))
        return told

    first, second = on_ranks(run, 2, tmp_path / "ranks")
    assert first == second, "every rank tells the same"
    assert "rank 1: " in first[0] and "File exists" in first[0]
    assert "model.w [7, 5] (here [7, 6])" in first[1] and "step-2/manifest.json: missing" in first[2]
    assert names(folder) == ["step-1"]


def test_names_that_only_some_ranks_hold_are_not_missed(tmp_path: Path) -> None:
    """As under pipeline parallelism: rank 0 holds one tensor, rank 1 another."""
    folder = tmp_path / "checkpoints"

    def run(world: World) -> list[str]:
        kept = manager(folder, world=world)
        mine = {f"model.stage{world.rank}": Chunk(torch.full((3,), float(world.rank)), (3,), (0,), True)}
        kept.save(1, mine, rng={}, **ABOUT)
        kept.wait()
        found = kept.newest()
        assert found is not None
        kept.load(found, mine, layout={})
        return sorted(found.manifest.tensors)

    assert on_ranks(run, 2, tmp_path / "ranks") == [["model.stage0", "model.stage1"]] * 2


def test_to_json_is_the_same_for_the_same_facts() -> None:
    assert to_json({"b": 1, "a": [1.5, None]}) == to_json({"a": [1.5, None], "b": 1}) == b'{"a":[1.5,null],"b":1}\n'
