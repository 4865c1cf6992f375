"""Streams: the train and the validation part of a store, each one long row of tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distllm.data.order import held_out, lone
from distllm.data.store import TokenStore

DOCUMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Stream:
    """Some stretches of a store, one after another. Neighbouring documents of one side are one stretch.

    With 5 % of the documents held out at random this takes 0.8 bytes of memory a document.
    """

    store: TokenStore
    starts: np.ndarray
    """Where each stretch begins in the store, int64 [R]."""
    ends: np.ndarray
    """Where each stretch ends in the stream, int64 [R]."""

    @property
    def n_tokens(self) -> int:
        """How long the stream is."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def stretches(self, position: int, length: int) -> Iterator[tuple[int, int, int]]:
        """What [position, position + length) of the stream is in the store: (offset from position, store position, tokens)."""
        r, taken = int(np.searchsorted(self.ends, position, side="right")), 0
        while taken < length and r < len(self.ends):
            before = int(self.ends[r - 1]) if r else 0
            inside = position + taken - before
            n = min(length - taken, int(self.ends[r]) - before - inside)
            if n > 0:
                yield taken, int(self.starts[r]) + inside, n
            taken += n
            r += 1

    def rows(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The ids of the stream from each position on.

        Args:
            positions: int64 [B].
            length: tokens of a row.

        Returns:
            int64 [B, length]; what is beyond the end of the stream is 0.
        """
        # Rows inside one stretch, nearly all, are gathered at once: a look per row costs more than its tokens.
        stretch = np.minimum(np.searchsorted(self.ends, positions, side="right"), len(self.ends) - 1)
        after = self.ends[stretch] - positions
        inside = after >= length
        tokens = np.asarray(self.store.tokens)
        shape = (max(0, len(tokens) - length + 1), length)
        windows = np.lib.stride_tricks.as_strided(tokens, shape, tokens.strides * 2, writeable=False)
        ends_at = self._store_ends[stretch]
        if inside.all():
            return windows[ends_at - after].astype(np.int64)
        out = np.zeros((len(positions), length), dtype=np.int64)
        out[inside] = windows[(ends_at - after)[inside]]
        for i in np.flatnonzero(~inside).tolist():
            for at, start, n in self.stretches(int(positions[i]), length):
                out[i, at : at + n] = tokens[start : start + n]
        return out

    @cached_property
    def _store_ends(self) -> np.ndarray:
        """Where each stretch ends in the store, int64 [R]."""
        return self.starts + np.diff(self.ends, prepend=0)

    def begins(self, positions: np.ndarray, length: int) -> np.ndarray:
        """Where documents begin in the rows from each position on: bool [B, length]."""
        out = np.zeros((len(positions), length), dtype=bool)
        for row, position in zip(out, positions.tolist(), strict=True):
            for at, start, n in self.stretches(position, length):
                row[self.store.starts_between(start, start + n) - start + at] = True
        return out


def whole(store: TokenStore) -> Stream:
    """The whole store as a stream."""
    return _one(store, 0, store.n_tokens)


def split_by_position(store: TokenStore, *, fraction: float) -> tuple[Stream, Stream]:
    """Train is the first, validation the last part of the tokens; the end marks of documents are not counted.

    So the one document of 1,115,394 characters is cut after 1,003,854 of them for 0.1, as is customary.
    """
    text = store.n_tokens - store.n_documents
    target = int((1 - fraction) * text)

    def before(document: int) -> int:
        return int(store.offsets_of(document, document + 1)[0]) - document

    document = bisect_right(range(store.n_documents), target, key=before) - 1
    cut = min(target + document, store.n_tokens) if fraction > 0 else store.n_tokens
    return _one(store, 0, cut), _one(store, cut, store.n_tokens)


def split_by_document(store: TokenStore, *, fraction: float, seed: int) -> tuple[Stream, Stream]:
    """Hold whole documents out, chosen by a hash of the seed and the document's number.

    With two documents or more and a fraction between 0 and 1 neither side is without a document: if the hash puts all on one
    side, the one with the smallest (largest) hash is moved.
    """
    count = store.n_documents
    spare = lone(count, fraction=fraction, seed=seed) if count <= 4096 else None
    changes: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    last: bool | None = None
    for first in range(0, count, DOCUMENTS_AT_ONCE):
        n = min(DOCUMENTS_AT_ONCE, count - first)
        side = held_out(n, fraction=fraction, seed=seed, first=first)
        if spare is not None:
            side[spare] = not side[spare]
        at = np.flatnonzero(side[1:] != side[:-1]) + 1
        if last is None or last != side[0]:
            at = np.concatenate([[0], at])
        changes.append(side[at])
        positions.append(store.offsets_of(first, first + n)[at])
        last = bool(side[-1])
    side, start = np.concatenate(changes), np.concatenate(positions)
    length = np.diff(np.append(start, store.n_tokens))
    train, validation = (Stream(store, start[side == s], np.cumsum(length[side == s])) for s in (False, True))
    return train, validation


def _one(store: TokenStore, start: int, end: int) -> Stream:
    if end <= start:
        return Stream(store, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    return Stream(store, np.array([start]), np.array([end - start]))
