"""A run of a tensor's numbers as boxes: each number once, in place."""

from __future__ import annotations

import itertools

import pytest
import torch

from distllm.engine.flat import boxes, flat_chunks
from distllm.parallel.packing import Packing
from distllm.parallel.tensor_plain import TensorPiece


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (3, 2, 4), (2, 1, 3, 2)])
def test_every_run_is_covered_once_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        found = list(boxes(shape, start, stop))
        slices = [tuple(slice(o, o + n) for o, n in zip(*box, strict=True)) for box in found]
        numbers = [number for box in slices for number in whole[box].flatten().tolist()]
        assert numbers == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1


def test_chunks_share_the_memory_of_the_row() -> None:
    row = torch.zeros(7)
    chunks = flat_chunks("w", row, shape=(3, 4), start=2)
    whole = torch.arange(12.0).view(3, 4)
    for chunk in chunks.values():
        (a, b), (h, w) = chunk.offset, chunk.data.shape
        chunk.data.copy_(whole[a : a + h, b : b + w])
    assert row.tolist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert list(chunks) == ["w#0", "w#1", "w#2"]


def test_one_number_and_none() -> None:
    assert flat_chunks("w", torch.zeros(0), shape=(), start=0) == {}
    assert flat_chunks("w", torch.zeros(0), shape=(3,), start=1) == {}
    (chunk,) = flat_chunks("w", torch.ones(1), shape=(), start=0).values()
    assert (chunk.shape, chunk.write) == ((), True)
    (chunk,) = flat_chunks("w", torch.zeros(0), shape=(0, 3), start=0).values()
    assert (chunk.shape, chunk.write) == ((0, 3), False)


@pytest.mark.parametrize(
    ("shape", "dim", "parts"), [((6, 5), 0, 1), ((3, 12), 1, 3), ((12, 2), 0, 3), ((2, 4, 3), 1, 2), ((6,), 0, 3)]
)
def test_runs_of_the_pieces_of_two_tp_ranks_make_the_whole_tensor(shape: tuple[int, ...], dim: int, parts: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    packing = Packing(dim, parts, 2)
    size = shape[dim] // 2
    for cut in range(whole.numel() // 2 + 1):  # where ZeRO cuts each piece in two
        found = torch.full_like(whole, -1)
        for rank in range(2):
            piece = TensorPiece(shape, dim, tuple(packing.boxes(rank * size, size, whole=shape[dim])))
            own = piece.cut(whole)
            put = torch.zeros_like(whole)
            piece.put(own, into=put)
            assert torch.equal(piece.cut(put), own) and int((put != 0).sum()) == int((own != 0).sum())
            for start, stop in ((0, cut), (cut, own.numel())):
                values = own.reshape(-1)[start:stop]
                for chunk in flat_chunks("name", values, shape=own.shape, start=start, piece=piece).values():
                    assert chunk.shape == shape and chunk.write
                    box = found[tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.data.shape, strict=True))]
                    assert (box == -1).all()
                    box.copy_(chunk.data)
        assert torch.equal(found, whole)
