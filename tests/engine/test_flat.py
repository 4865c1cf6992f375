"""A run of a tensor's numbers as boxes: each number once, in place."""

from __future__ import annotations

import itertools

import pytest
import torch

from distllm.engine.flat import boxes, flat_chunks


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
