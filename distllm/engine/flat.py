"""ZeRO cuts tensors as if they were one long row of numbers; a checkpoint knows boxes. This is the way between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch

from distllm.checkpoint.chunk import Chunk
from distllm.parallel.tensor_plain import TensorPiece

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


def flat_chunks(
    key: str,
    values: torch.Tensor,
    *,
    shape: Sequence[int],
    start: int,
    piece: TensorPiece | None = None,
    write: bool = True,
) -> dict[str, Chunk]:
    """The chunks that a run of a tensor's numbers makes; they share its memory.

    Args:
        key: the tensor's name in a checkpoint.
        values: the numbers, [N].
        shape: of the tensor that ZeRO cut: the whole one, or the piece of it that a tp rank has.
        start: the place of the first number in it.
        piece: where that piece lies in the whole tensor; None: it is the whole one.
        write: whether this rank is the first of those that hold these numbers.
    """
    own = tuple(shape)
    whole = own if piece is None else piece.shape
    if not own or not prod(own):  # one number, which may lie on another rank, or none
        mine = values.numel() == 1 or not prod(own)
        return {key: Chunk(values.reshape(own), own, (0,) * len(own), write and own == ())} if mine else {}
    found: list[Chunk] = []
    used = 0
    for offset, sizes in boxes(own, start, start + values.numel()):
        length = prod(sizes)
        box = values.narrow(0, used, length).view(sizes)
        used += length
        if piece is None:
            found.append(Chunk(box, whole, offset, write))
            continue
        dim = piece.dim
        for inside, at, count in piece.split(offset[dim], sizes[dim]):
            found.append(Chunk(box.narrow(dim, inside, count), whole, (*offset[:dim], at, *offset[dim + 1 :]), write))
    return {f"{key}#{number}": chunk for number, chunk in enumerate(found)}


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for offset, sizes in boxes(shape[1:], start, stop):
        yield (row, *offset), (1, *sizes)
