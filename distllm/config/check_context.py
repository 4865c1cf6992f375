"""What context parallelism asks of a sequence and of heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal


def context_problems(
    seq_len: int, *, cp: int, method: Literal["ring", "all_gather", "ulysses"], heads: int | None, tp: int
) -> Iterator[str]:
    """What is wrong with cutting sequences over ranks.

    Args:
        seq_len: tokens of a sample.
        cp: context-parallel ranks.
        method: ring and all_gather give each rank two parts of a sequence, ulysses one part, and some heads for the
            attention.
        heads: query heads of a layer; None where they are not known. Any number of key heads goes: ulysses repeats those
            that cp does not divide.
        tp: tensor-parallel ranks, which spread the heads first.
    """
    if cp == 1:
        return
    parts = cp if method == "ulysses" else 2 * cp
    if seq_len % parts:
        rule = f"must be a multiple of {parts}, because {method} over layout.cp={cp} cuts it in {parts}"
        yield f"data.seq_len={seq_len}: {rule}; nearest: {max(parts, parts * round(seq_len / parts))}"
    if method == "ulysses" and heads is not None:
        yield from ulysses_problems(heads, cp=cp, tp=tp)


def ulysses_problems(heads: int, *, cp: int, tp: int) -> Iterator[str]:
    """What is wrong with spreading the heads of a layer.

    Args:
        heads: query heads of a layer.
        cp: context-parallel ranks.
        tp: tensor-parallel ranks, which spread the heads first.
    """
    if heads % tp:
        return  # told by tensor parallelism
    here = heads // tp
    if here % cp:
        near = min((d for d in range(1, here + 1) if here % d == 0), key=lambda d: (abs(d - cp), d))
        rule = f"ulysses spreads heads, and {cp} does not divide {here}" + (f" (heads {heads} / tp {tp})" if tp > 1 else "")
        yield f"layout.cp={cp}: {rule}; nearest: {near}, or layout.cp_method=all_gather"
