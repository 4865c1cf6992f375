from __future__ import annotations

import os
import shutil
import tempfile
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from distllm.checkpoint import commit, find, sharded
from distllm.checkpoint import manager as manager_module
from distllm.checkpoint.chunk import Chunk
from distllm.checkpoint.manifest import to_json
from distllm.comm import World, any_rank, gather
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
    write_two,
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
    assert not kept.write_failed(), "nothing is known yet, and it does not wait"
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
    first = {name: view.data_ptr() for name, view in kept._staging._views.items()}
    for step in (1, 2):
        save(kept, step)
        kept.wait()
        assert {name: view.data_ptr() for name, view in kept._staging._views.items()} == first
    other = {"model.w": Chunk(torch.ones(2, 2), (2, 2), (0, 0), True)}
    kept.save(3, other, rng={}, **ABOUT)
    kept.wait()
    assert kept._staging._views.keys() == other.keys()


@pytest.mark.parametrize("call", ["wait", "save"])
def test_a_failed_write_is_told_once_at_the_next_call(folder: Path, call: str) -> None:
    kept = manager(folder)
    save(kept, 1)
    kept.wait()
    (folder / ".tmp-step-2-a-2").touch()  # a file where the folder should go
    save(kept, 2)
    assert kept._pending is not None
    kept._pending.exception()  # it is known now
    assert kept.write_failed()
    with pytest.raises(StorageError, match="while writing the checkpoint of step 2"):
        {"wait": kept.wait, "save": lambda: save(kept, 3)}[call]()
    assert not kept.write_failed()
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


def test_a_failed_write_of_one_rank_is_known_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the loop: a flag of each rank in the agreement of the step, and `wait` on all once it is raised."""
    folder = tmp_path / "checkpoints"
    real = sharded.write_rank

    def run(world: World) -> list[object]:
        gate = threading.Event()

        def write_rank(*args, **kwargs):  # type: ignore[no-untyped-def]
            if world.rank == 1:
                raise OSError(28, "No space left on device", "rank-00001.safetensors")
            assert gate.wait(30.0)
            return real(*args, **kwargs)

        kept = manager(folder, world=world)
        kept.save(1, two_rank_chunks(world.rank, 1), rng={}, **ABOUT)
        kept.wait()
        monkeypatch.setattr(sharded, "write_rank", write_rank)
        kept.save(2, two_rank_chunks(world.rank, 2), rng={}, **ABOUT)
        while not any_rank(kept.write_failed(), world):
            pass
        mine = kept.write_failed()
        gate.set()
        with pytest.raises(StorageError) as raised:
            kept.wait()
        found = kept.newest()
        assert found is not None and not kept.write_failed()
        return [mine, found.step, str(raised.value), world.is_main or names(folder)]

    first, second = on_ranks(run, 2, tmp_path / "ranks")
    assert [first[0], second[0]] == [False, True], "rank 0 still writes, and only learns of it from the agreement"
    assert first[1:3] == second[1:3] and first[1] == 1
    assert "No space left on device while writing the checkpoint of step 2" in first[2]
    assert second[3] == ["step-1"]


def test_to_find_a_checkpoint_each_rank_checks_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no rank waits in a collective for rank 0 to read terabytes."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        write_two(folder, step=step)
    (folder / "step-3" / "rank-00001.safetensors").write_bytes(b"")
    real = manager_module.check_files

    def run(world: World) -> list[object]:
        mine = []

        def check_files(where, files, chosen):  # type: ignore[no-untyped-def]
            mine.extend((where.name, name) for name in chosen)
            return real(where, files, chosen)

        monkeypatch.setattr(manager_module, "check_files", check_files)
        monkeypatch.setattr(find, "check", lambda path: pytest.fail("one rank checks alone"))
        kept = manager(tmp_path / "mine", world=world)
        told = []
        for bad in (folder / "step-3", tmp_path / "nowhere"):
            with pytest.raises(CheckpointError) as raised:
                kept.find(bad)
            told.append(str(raised.value))
        mine.clear()
        return [kept.find(tmp_path).step, kept.find(folder / "step-1").step, told, mine]

    first, second = on_ranks(run, 2, tmp_path / "ranks")
    assert first[:3] == second[:3] and first[:2] == [2, 1]
    assert "step-3/rank-00001.safetensors: 0 bytes" in first[2][0] and "no such folder" in first[2][1]
    shares = [[name for step, name in each[3] if step == "step-2"] for each in (first, second)]
    assert sorted(shares[0] + shares[1]) == sorted(p.name for p in (folder / "step-2").iterdir() if p.stem != "manifest")
    assert shares[0] and shares[1]
    assert (folder / "step-3").exists(), "finding changes nothing"


@pytest.mark.parametrize("slow", ["hold", "tidy", "rmtree"])
def test_ranks_wait_longer_than_a_collective_for_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    folder = tmp_path / "checkpoints"
    where = shutil if slow == "rmtree" else manager_module
    real = getattr(where, slow)

    def run(world: World) -> int:
        def late(*args, **kwargs):  # type: ignore[no-untyped-def]
            threading.Event().wait(1.5)
            return real(*args, **kwargs)

        torch.distributed.barrier()
        monkeypatch.setattr(where, slow, late)
        monkeypatch.setattr(manager_module, "_BREATH_S", 0.1)
        torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))._set_default_timeout(
            timedelta(seconds=0.5)
        )
        kept = manager(folder, world=world)
        if slow == "rmtree":
            chunks = {} if world.is_main else {"model.w": Chunk(torch.zeros(2, dtype=torch.complex64), (2,), (0,), True)}
            kept.save(1, chunks, rng={}, **ABOUT)
            with pytest.raises(StorageError, match="rank 1: "):
                kept.wait()
        return len(gather(1, world))

    assert on_ranks(run, 2, tmp_path / "ranks") == [2, 2]


def test_names_are_sent_only_when_ranks_hold_different_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At thousands of ranks, every name from every rank would be gigabytes."""
    folder = tmp_path / "checkpoints"
    write_two(folder)

    def run(world: World) -> int:
        sent = []

        def counted(value, world):  # type: ignore[no-untyped-def]
            sent.append(value)
            return gather(value, world)

        kept = manager(tmp_path / "mine", world=world)
        found = kept.find(folder)
        monkeypatch.setattr(manager_module, "gather", counted)
        kept.load(found, two_rank_chunks(world.rank, 2), layout={})
        return len(sent)

    assert on_ranks(run, 2, tmp_path / "ranks") == [0, 0]


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
