from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from distllm.checkpoint import manager as manager_module
from distllm.checkpoint import sharded
from distllm.checkpoint.chunk import Chunk, chunk_of
from distllm.checkpoint.commit import Save, write
from distllm.checkpoint.find import check
from distllm.checkpoint.manifest import Piece, TensorRecord, uncovered
from distllm.comm import World
from distllm.config.errors import CheckpointError
from tests.checkpoint.conftest import ABOUT, blank, chunks_of, equal, manager, tensors, write_two
from tests.ranks import on_ranks

# name -> ranks, mesh shape, placements of every tensor; None: plain tensors, the same on every rank
LAYOUTS: dict[str, tuple[int, tuple[int, ...], list[Placement] | None]] = {
    "one": (1, (1,), None),
    "replicate2": (2, (2,), None),
    "shard2": (2, (2,), [Shard(0)]),
    "columns2": (2, (2,), [Shard(1)]),
    "shard4": (4, (4,), [Shard(0)]),
    "hsdp2x2": (4, (2, 2), [Replicate(), Shard(0)]),
    "grid2x2": (4, (2, 2), [Shard(0), Shard(1)]),
}
WHOLE = {
    "uneven": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)),
    "half": torch.randn(6, 10, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "three_dims": torch.arange(5 * 3 * 2).reshape(5, 3, 2),
    "fewer_rows_than_ranks": torch.tensor([[1.0, float("nan"), -0.0]]),
    "nothing": torch.zeros(0, 2),
}


def laid_out(name: str, values: dict[str, torch.Tensor], rank: int) -> dict[str, Chunk]:
    _, shape, placements = LAYOUTS[name]
    result = {"step": chunk_of(values["step"], like=values["step"], write=rank == 0)}
    mesh = init_device_mesh("cpu", shape) if placements else None
    for key, value in values.items():
        if key == "step":
            continue
        if placements is None:
            result[key] = chunk_of(value.clone(), like=value, write=rank == 0)
            continue
        spread = distribute_tensor(value.clone(), mesh, placements, src_data_rank=None)
        assert isinstance(spread, DTensor)
        coordinate = spread.device_mesh.get_coordinate()
        first = all(c == 0 for c, p in zip(coordinate, spread.placements, strict=True) if not isinstance(p, Shard))
        result[key] = chunk_of(spread.to_local(), like=spread, write=first)
    return result


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_layout_reads_what_every_layout_wrote(tmp_path: Path) -> None:
    values = {**WHOLE, "step": torch.tensor(17.0)}
    numbers = {name: number for number, name in enumerate(LAYOUTS)}
    of_size = {size: [n for n in LAYOUTS if LAYOUTS[n][0] == size] for size in (1, 2, 4)}

    def write_all(world: World) -> None:
        for name in of_size[world.size]:
            save = Save(tmp_path, numbers[name], "t", world.rank, world.size, 30.0, {}, {"name": name}, "", "")
            write(save, laid_out(name, values, world.rank), {})

    for size in of_size:
        on_ranks(write_all, size, tmp_path / "ranks")
    found = [check(tmp_path / f"step-{number}") for number in numbers.values()]

    def read_all(world: World) -> list[str]:
        wrong = []
        for name in of_size[world.size]:
            wanted = laid_out(name, values, world.rank)
            for one in found:
                mine = laid_out(name, {k: torch.full_like(v, 3) for k, v in values.items()}, world.rank)
                sharded.read(one.folder, one.manifest, mine)
                differ = [key for key in mine if bits(mine[key].data) != bits(wanted[key].data)]
                wrong += [f"{one.manifest.layout['name']} -> {name}: {key} on rank {world.rank}" for key in differ]
        return wrong

    for size in of_size:
        assert on_ranks(read_all, size, tmp_path / "ranks") == [[]] * size


def test_empty_shards_go_through_four_one_two_and_four_ranks(tmp_path: Path) -> None:
    """Tensors with fewer rows than ranks: some ranks hold an empty piece; saved and loaded again at every turn."""
    shapes = {"row": (1, 3), "two_rows": (2, 5), "three_rows": (3,), "five_rows": (5, 2), "no_rows": (0, 2)}
    whole = {n: torch.randn(s, generator=torch.Generator().manual_seed(len(n))) for n, s in shapes.items()}
    values = {**whole, "step": torch.tensor(3.0)}
    folder = tmp_path / "checkpoints"

    def turn(world: World, step: int) -> int:
        kept = manager(folder, world=world, attempt=str(step), keep=9)
        layout = {1: "one", 2: "shard2", 4: "shard4"}[world.size]
        wanted = laid_out(layout, values, world.rank)
        mine = wanted
        if step:
            found = kept.newest()
            assert found is not None and found.step == step - 1
            mine = laid_out(layout, {k: torch.full_like(v, 7) for k, v in values.items()}, world.rank)
            kept.load(found, mine, layout={})
            assert all(bits(mine[k].data) == bits(wanted[k].data) for k in wanted)
        kept.save(step, mine, rng={}, **ABOUT)
        kept.wait()
        return sum(not chunk.data.numel() for chunk in mine.values())

    empty = [on_ranks(lambda world, step=step: turn(world, step), size, tmp_path / "r") for step, size in enumerate((4, 1, 2, 4))]
    assert empty == [[1, 2, 3, 5], [1], [1, 2], [1, 2, 3, 5]], "only no_rows is empty on rank 0, everything on the last of four"
    read = dict(sharded.read_full(folder / "step-3", check(folder / "step-3").manifest, values))
    assert all(torch.equal(read[name], values[name]) for name in values)


def test_a_piece_is_written_once(tmp_path: Path) -> None:
    def write_it(world: World) -> list[str]:
        values = {**WHOLE, "step": torch.tensor(1.0)}
        save = Save(tmp_path, 1, "t", world.rank, world.size, 30.0, {}, {}, "", "")
        write(save, laid_out("hsdp2x2", values, world.rank), {})
        return []

    on_ranks(write_it, 4, tmp_path / "ranks")
    sizes = [sum(t.numel() for t in load_file(p).values()) for p in sorted((tmp_path / "step-1").glob("*.safetensors"))]
    assert sum(sizes) == sum(v.numel() for v in WHOLE.values()) + 1
    assert sizes[2] == sizes[3] == 0, "the second replica writes nothing"


def test_any_program_can_open_the_file_and_its_digest_is_of_the_file(tmp_path: Path) -> None:
    values = {
        "float": torch.randn(3, 4),
        "brain": torch.randn(5).bfloat16(),
        "long": torch.arange(3),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "view": torch.randn(100, 100).t()[1:3, :7],
    }
    record = sharded.write_rank(tmp_path, rank=3, chunks=chunks_of(values), rng={"torch": torch.get_rng_state()})
    path = tmp_path / "rank-00003.safetensors"
    loaded = load_file(path)
    assert torch.equal(loaded.pop("rng/torch"), torch.get_rng_state())
    assert loaded.keys() == values.keys()
    assert all(bits(loaded[n]) == bits(values[n]) and loaded[n].dtype == values[n].dtype for n in values)
    content = path.read_bytes()
    assert record.files[path.name].size == len(content)
    assert record.files[path.name].sha256 == hashlib.sha256(content).hexdigest()
    assert path.stat().st_size < 8000, "a view is written without the storage it is a view of"


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(folder: Path) -> None:
    found = check(write_two(folder))
    chunks = blank()
    for number in range(7):
        chunks[f"optim.extra.{number}"] = Chunk(torch.zeros(2), (2,), (0,), True)
    del chunks["model.b"]
    chunks["model.w"] = Chunk(torch.zeros(5, 7), (5, 7), (0, 0), True)
    chunks["optim.w.step"] = Chunk(torch.zeros((), dtype=torch.int64), (), (), True)
    with pytest.raises(CheckpointError) as raised:
        sharded.read(found.folder, found.manifest, chunks)
    line = str(raised.value)
    assert "\n" not in line and str(found.folder) in line
    assert "does not have optim.extra.0, optim.extra.1, optim.extra.2, optim.extra.3, optim.extra.4 and 2 more" in line
    assert "this run does not have model.b" in line
    assert "model.w [7, 5] (here [5, 7])" in line
    assert "optim.w.step F32 (here I64)" in line
    assert not any(chunk.data.any() for chunk in chunks.values())


def test_a_hole_or_an_overlap_in_the_table_is_refused(folder: Path) -> None:
    found = check(write_two(folder))
    record = found.manifest.tensors["model.w"]
    first, second = record.pieces
    for pieces in ([first], [first, second, second], [replace(first, sizes=(3, 5)), second]):
        table = {**found.manifest.tensors, "model.w": replace(record, pieces=tuple(pieces))}
        assert uncovered(table["model.w"]) is not None
        with pytest.raises(CheckpointError, match=r"model\.w"):
            sharded.read(found.folder, replace(found.manifest, tensors=table), blank())


def test_overlaps_are_found_in_two_dims() -> None:
    def record(*boxes: tuple[tuple[int, int], tuple[int, int]]) -> TensorRecord:
        return TensorRecord((4, 4), "F32", tuple(Piece("f", "k", o, s) for o, s in boxes))

    assert uncovered(record(((0, 0), (2, 4)), ((2, 0), (2, 2)), ((2, 2), (2, 2)))) is None
    assert uncovered(record(((0, 0), (2, 4)), ((2, 0), (2, 2)))) == "its pieces hold 12 of 16 values"
    assert uncovered(record(((0, 0), (3, 2)), ((2, 0), (2, 2)), ((0, 2), (3, 2)))) == "two of its pieces overlap"
    assert uncovered(record(((0, 0), (4, 4)), ((0, 2), (0, 2)))) is None


def test_a_file_that_is_not_what_the_manifest_says_is_named(folder: Path) -> None:
    found = check(write_two(folder))
    path = found.folder / "rank-00001.safetensors"
    save_file({name: value.double() for name, value in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: .* is not what the manifest says"):
        sharded.read(found.folder, found.manifest, blank())
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors"):
        sharded.read(found.folder, found.manifest, blank())


def test_only_the_files_that_hold_a_needed_box_are_opened(folder: Path) -> None:
    found = check(write_two(folder))
    (found.folder / "rank-00001.safetensors").unlink()
    part = torch.zeros(2, 5)
    names = found.manifest.tensors.keys()
    sharded.read(found.folder, found.manifest, {"model.w": Chunk(part, (7, 5), (1, 0), False)}, expected=names)
    assert torch.equal(part, tensors(1)["model.w"][1:3])


def test_tensors_of_two_ranks_are_read_whole_in_one_process(folder: Path) -> None:
    found = check(write_two(folder))
    whole = dict(sharded.read_full(found.folder, found.manifest, ["model.w", "optim.w.step", "model.none"]))
    assert all(torch.equal(whole[name], tensors(1)[name]) for name in whole)
    chunks = blank()
    sharded.read(found.folder, found.manifest, chunks)
    assert equal(chunks, tensors(1))


def test_boxes_of_one_tensor_are_one_name_when_ranks_compare_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may hold different numbers of boxes; that is no reason to send all names of all ranks to all ranks."""
    whole = torch.arange(6.0)
    monkeypatch.setattr(manager_module, "gather", None)

    def rank(world: World) -> list[list[float]]:
        places = [[(0, 2)], [(2, 3), (5, 1)]][world.rank]
        mine = {
            f"w#{number}": Chunk(whole[at : at + length].clone(), (6,), (at,), True) for number, (at, length) in enumerate(places)
        }
        kept = manager(tmp_path / "checkpoints", world=world)
        kept.save(1, mine, rng={}, **ABOUT)
        kept.wait()
        found = kept.newest()
        assert found is not None
        for chunk in mine.values():
            chunk.data.zero_()
        kept.load(found, mine, layout={})
        return [chunk.data.tolist() for chunk in mine.values()]

    assert on_ranks(rank, 2, tmp_path / "ranks") == [[[0.0, 1.0]], [[2.0, 3.0, 4.0], [5.0]]]
