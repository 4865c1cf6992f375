"""The training or the validation side of examples: which example each sample is, and its tokens. B samples, N of a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distllm.config.errors import DataError
from distllm.config.schema import ValidationConfig
from distllm.data.example_store import ExampleStore
from distllm.data.order import divided, key_of
from distllm.data.ragged import Ragged
from distllm.data.truncate import Kept


@dataclass(frozen=True)
class Side:
    """Samples of some sources. A sample is an example, or a window of one."""

    stores: tuple[ExampleStore, ...]
    examples: tuple[np.ndarray, ...]
    """For each source the example that each sample is (of), int64 [N]."""
    firsts: tuple[np.ndarray, ...] | None = None
    """For each source the token that each window begins with, int64 [N]; None: samples are whole examples."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each source."""
        return tuple(len(some) for some in self.examples)

    def all_of(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, sample) of every sample of source k, int64 [N] each."""
        return np.full(self.sizes[k], k, dtype=np.int64), np.arange(self.sizes[k])

    def example(self, source: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """The example of each sample, int64 [B]."""
        return self.picked(self.examples, source, sample)

    def first(self, source: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """The token that each sample begins with, int64 [B]; 0 for whole examples."""
        return np.zeros_like(sample) if self.firsts is None else self.picked(self.firsts, source, sample)

    def document(self, source: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """A number for the example of each sample among those of all sources, int64 [B]."""
        before = np.cumsum([0, *(len(store) for store in self.stores)])
        return before[source] + self.example(source, sample)

    def has(self, field: str, source: np.ndarray) -> np.ndarray:
        """Whether each sample's source has a field, bool [B]."""
        return np.array([field in store.fields for store in self.stores])[source]

    def lengths(self, field: str, source: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """Tokens of a field of each sample's whole example, int64 [B]; 0 where the source has no such field."""
        example, out = self.example(source, sample), np.zeros_like(sample)
        for k, store in enumerate(self.stores):
            if field in store.fields:
                mine = self._of(k, source)
                offsets, at = store.offsets[field], example[mine]
                out[mine] = offsets[at + 1] - offsets[at]
        return out

    def labels(self, source: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """The label of each sample, float64 [B] (class numbers are whole); 0 where the source has none."""
        example, out = self.example(source, sample), np.zeros(len(sample))
        for k, store in enumerate(self.stores):
            if store.labels is not None:
                mine = self._of(k, source)
                out[mine] = store.labels[example[mine]]
        return out

    def read(self, field: str, source: np.ndarray, sample: np.ndarray, kept: Kept) -> Ragged:
        """What is kept of a field of each sample; nothing of a field that the source does not have."""
        rows = Ragged(np.empty(int(kept.length.sum()), dtype=np.int64), kept.length)
        example, row, column = self.example(source, sample), rows.row, rows.column
        place = column + np.where(column < kept.cut[row], 0, kept.skip[row])
        for k, store in enumerate(self.stores):
            if field in store.fields:
                mine = self._of(k, source[row])
                at = store.offsets[field][example[row[mine]]] + place[mine]
                rows.ids[mine] = store.fields[field].tokens[at]
        return rows

    def _of(self, k: int, source: np.ndarray) -> np.ndarray | slice:
        """The places of the samples of source k; all where there is one source."""
        return slice(None) if len(self.stores) == 1 else np.flatnonzero(source == k)

    def picked(self, tables: Sequence[np.ndarray], source: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """The entry of each sample in tables, one a source, of a number a sample: int64 [B]."""
        if len(tables) == 1:
            return tables[0][sample]
        out = np.empty_like(sample)
        for k, table in enumerate(tables):
            mine = np.flatnonzero(source == k)
            out[mine] = table[sample[mine]]
        return out


def divide(
    stores: Sequence[ExampleStore], validation: Sequence[ExampleStore], *, config: ValidationConfig, seed: int
) -> tuple[Side, Side]:
    """The training and the validation side: separate validation sources, or examples held out of the training sources.

    Raises:
        DataError: a source has one example and cannot be divided, or there is nothing to evaluate on.
    """
    if validation:
        sides = [Side(tuple(s), tuple(np.arange(len(store)) for store in s)) for s in (stores, validation)]
        return sides[0], sides[1]
    held = []
    for k, store in enumerate(stores):
        n = len(store)
        if n < 2:
            rule = f"source {k} is one example and cannot be divided"
            raise DataError(f"data.validation.fraction={config.fraction}: {rule}; give more, or data.validation.sources")
        if config.by == "position":
            held.append(np.arange(n) >= n - min(n - 1, max(1, round(n * config.fraction))))
        else:
            held.append(divided(n, fraction=config.fraction, seed=key_of(seed, k)))
    train, other = (tuple(np.flatnonzero(side == s) for side in held) for s in (False, True))
    return Side(tuple(stores), train), Side(tuple(stores), other)
