"""Rows of different lengths in one flat array, and the padded matrix that a model takes.

B rows, T tokens in all, W the width of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROUND = 8  # wide rows are padded to multiples of it: tensor cores want that, and a compiled model meets fewer shapes
EXACT = 64  # up to here the width is the longest row's: for sentences of 15 tokens multiples of 8 are a fifth more to compute


@dataclass(frozen=True)
class Ragged:
    """B rows of token ids, one after another."""

    ids: np.ndarray
    """int64 [T]."""
    lengths: np.ndarray
    """int64 [B]."""

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each row begins in `ids`, int64 [B]."""
        return self.bounds[:-1]

    @cached_property
    def bounds(self) -> np.ndarray:
        """Where each row begins, and the number of tokens: int64 [B + 1]."""
        out = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=out[1:])
        return out

    @cached_property
    def row(self) -> np.ndarray:
        """The row of each token, int64 [T]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def column(self) -> np.ndarray:
        """The place of each token in its row, int64 [T]."""
        return np.arange(len(self.ids)) - self.starts[self.row]

    def part(self, first: int, last: int) -> Ragged:
        """The rows [first, last)."""
        return Ragged(self.ids[self.bounds[first] : self.bounds[last]], self.lengths[first:last])

    def chosen(self, keep: np.ndarray) -> Ragged:
        """Only the tokens where `keep`, bool [T], holds."""
        return Ragged(self.ids[keep], np.bincount(self.row[keep], minlength=len(self.lengths)))


def ragged(rows: Sequence[Sequence[int] | np.ndarray]) -> Ragged:
    """Put rows of ids one after another."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Ragged(np.concatenate([np.zeros(0, dtype=np.int64), *rows]).astype(np.int64), lengths)


def empty(rows: int) -> Ragged:
    """Rows without tokens."""
    return Ragged(np.zeros(0, dtype=np.int64), np.zeros(rows, dtype=np.int64))


def rounded(length: int, *, limit: int) -> int:
    """The width of a matrix whose longest row has `length` tokens: at least 8, above 64 a multiple of 8, at most `limit`."""
    wide = max(length, ROUND) if length <= EXACT else -(-length // ROUND) * ROUND
    return max(length, min(wide, limit))


def all_rounded(lengths: np.ndarray, *, limit: int) -> np.ndarray:
    """`rounded` for each length, int64."""
    wide = np.where(lengths <= EXACT, np.maximum(lengths, ROUND), -(-lengths // ROUND) * ROUND)
    return np.maximum(lengths, np.minimum(wide, limit))


def padded(rows: Ragged, *, fill: int, limit: int) -> np.ndarray:
    """The rows as a matrix, int64 [B, W], filled up with `fill`; `limit` as in `rounded`."""
    out = np.full((len(rows.lengths), rounded(int(rows.lengths.max(initial=0)), limit=limit)), fill, dtype=np.int64)
    out[rows.row, rows.column] = rows.ids
    return out


def seen(lengths: np.ndarray, width: int) -> np.ndarray:
    """What a model may look at, int64 [B, width]: the tokens of each row; of a row without tokens its first place.

    A row that may look at nothing is NaN in softmax, and 0 times NaN is NaN in a gradient.
    """
    return (np.arange(width) < np.maximum(lengths, 1)[:, None]).astype(np.int64)


@dataclass(frozen=True)
class Frame:
    """Where the special tokens of an input stand: begin text separator, or begin text separator pair separator."""

    begin: int | None
    separator: int
    pad: int

    def specials(self, paired: np.ndarray) -> np.ndarray:
        """How many special tokens each row takes, int64 [B]; `paired`, bool [B], says which have a second text."""
        return (1 if self.begin is not None else 0) + 1 + paired.astype(np.int64)

    def join(self, text: Ragged, pair: Ragged, *, paired: np.ndarray, used: np.ndarray, limit: int) -> Framed:
        """Put texts, second texts and special tokens into a matrix.

        Args:
            text: the first texts, B rows.
            pair: the second texts, B rows; empty where there is none.
            paired: bool [B], whether a row has a second text.
            used: bool [B]; False is a row of padding.
            limit: the greatest width.
        """
        head = 0 if self.begin is None else 1
        lengths = np.where(used, text.lengths + pair.lengths + self.specials(paired), 0)
        width = rounded(int(lengths.max(initial=0)), limit=limit)
        ids = np.full((len(lengths), width), self.pad, dtype=np.int64)
        ids[text.row, text.column + head] = text.ids
        second = text.lengths + head + 1  # where the second text begins
        at = np.flatnonzero(used)
        if self.begin is not None:
            ids[at, 0] = self.begin
        ids[at, second[at] - 1] = self.separator
        if paired.any():
            ids[pair.row, pair.column + second[pair.row]] = pair.ids
            at = np.flatnonzero(used & paired)
            ids[at, lengths[at] - 1] = self.separator
        return Framed(ids, lengths, second)


@dataclass(frozen=True)
class Framed:
    """Inputs with their special tokens."""

    ids: np.ndarray
    """int64 [B, W], padded."""
    lengths: np.ndarray
    """int64 [B], special tokens included; 0 for a row of padding."""
    second: np.ndarray
    """int64 [B], the column where the second text begins, or would begin."""

    @property
    def mask(self) -> np.ndarray:
        """int64 [B, W], as `seen`."""
        return seen(self.lengths, self.ids.shape[1])
