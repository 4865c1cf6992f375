"""ZeRO cuts tensors as if they were one long row of numbers; a checkpoint knows boxes. This is the way between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch

from distllm.checkpoint.chunk import Chunk

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, sizes), an index and a length for each dim."""


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes that the numbers [start, stop) of a tensor fill, in their order; together at most 2 * dims - 1.

    Args:
        shape: of the tensor, at least one dim; its numbers lie row by row.
        start: the first number.
        stop: after the last one.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = prod(shape[1:])
    first, last = start // row, stop // row
    whole = first if start % row == 0 else first + 1  # the first row of which all is there
    if whole > last:
        yield from _in_row(shape, first, start - first * row, stop - first * row)
        return
    if first < whole:
        yield from _in_row(shape, first, start - first * row, row)
    if whole < last:
        yield (whole, *(0 for _ in shape[1:])), (last - whole, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def flat_chunks(key: str, values: torch.Tensor, *, shape: Sequence[int], start: int) -> dict[str, Chunk]:
    """The chunks that a run of a tensor's numbers makes; they share its memory.

    Args:
        key: the tensor's name in a checkpoint.
        values: the numbers, [N]; this rank alone holds them.
        shape: of the whole tensor.
        start: the place of the first number in it.
    """
    whole = tuple(shape)
    if not whole or not prod(whole):  # one number, which may lie on another rank, or none
        mine = values.numel() == 1 or not prod(whole)
        return {key: Chunk(values.reshape(whole), whole, (0,) * len(whole), bool(whole == ()))} if mine else {}
    chunks, used = {}, 0
    for number, (offset, sizes) in enumerate(boxes(whole, start, start + values.numel())):
        length = prod(sizes)
        chunks[f"{key}#{number}"] = Chunk(values.narrow(0, used, length).view(sizes), whole, offset, True)
        used += length
    return chunks


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for offset, sizes in boxes(shape[1:], start, stop):
        yield (row, *offset), (1, *sizes)
