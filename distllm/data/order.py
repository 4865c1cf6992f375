"""Which sample is the i-th: pure functions of (seed, i), the same for every layout, worker count and restart.

A permutation of [0, n) is a generalised Feistel network on the smallest rectangle of whole rows that holds n, walked until it
lands below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002): O(1) in time and memory for any n,
so position 10^9 of epoch 7 costs what position 0 costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

ROUNDS = 6
WORD = 2**64 - 1
SMALLEST_BLOCK = 1024  # samples after which the proportions of a mixture are exact


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 values one to one: the finaliser of splitmix64 (Steele et al., OOPSLA 2014)."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key_of(*parts: int) -> int:
    """One 64-bit key for a tuple of integers such as (seed, source, epoch)."""
    key = 0
    for part in parts:
        key = _mix_one(key ^ (part & WORD))
    return key


def _mix_one(value: int) -> int:
    """`mix` of one number, which in Python's own integers takes a tenth of numpy's time."""
    z = (value + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


@lru_cache(maxsize=256)
def _round_keys(key: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(key_of(key, round_)) for round_ in range(ROUNDS))


def keys_of(*parts: int | np.ndarray) -> np.ndarray:
    """`key_of` for many tuples at once: each part one integer, or int64 or uint64 [n]; uint64 [n]."""
    key = np.zeros(max(np.size(part) for part in parts), dtype=np.uint64)
    for part in parts:
        word = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(part & WORD)
        key = mix(key ^ word)
    return key


def permute(index: np.ndarray, *, size: int, key: int) -> np.ndarray:
    """Apply the permutation of [0, size) that `key` names.

    Args:
        index: int64 [n], each in [0, size).
        size: how many there are, at most 2^62.
        key: which permutation.

    Returns:
        int64 [n]: where each index goes.
    """
    # The smallest rectangle of whole rows: less than one index in sqrt(size) lands outside and is sent on.
    rows = math.isqrt(size - 1) + 1
    height, width = np.uint64(-(-size // rows)), np.uint64(rows)
    sides = (height, width)
    out = index.astype(np.uint64)
    todo: np.ndarray | slice = slice(None)
    while True:
        halves = list(np.divmod(out[todo], width))
        for i, round_key in enumerate(_round_keys(key)):
            changed = i % 2
            halves[changed] = (halves[changed] + mix(halves[1 - changed] ^ round_key) % sides[changed]) % sides[changed]
        out[todo] = halves[0] * width + halves[1]
        todo = np.flatnonzero(out >= np.uint64(size))
        if not len(todo):
            return out.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The order of the training samples of one or several sources."""

    sizes: tuple[int, ...]
    """Samples of each source in an epoch."""
    weights: tuple[float, ...]
    """Shares of the sources, in any unit."""
    seed: int
    shuffle: bool
    """Whether each epoch of a source is permuted anew; without it a source is read from its beginning."""

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Say which samples are the `index`-th.

        Args:
            index: global sample numbers, int64 [n], from 0 and without end.

        Returns:
            The source of each, int64 [n], and its sample within that source, int64 [n]. In every block of samples (1,024
            unless a weight is below 0.002) each source has its exact share, to one sample over the whole run so far.
        """
        source, sample, _ = self.where(index)
        return source, sample

    def where(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `locate`, and the epoch of each sample's source, int64 [n]."""
        source, ordinal = self._source(index)
        sample, epoch = np.empty_like(ordinal), np.empty_like(ordinal)
        for k, size in enumerate(self.sizes):
            mine = np.flatnonzero(source == k) if len(self.sizes) > 1 else slice(None)
            passed, within = np.divmod(ordinal[mine], size)
            if self.shuffle:
                for e in sorted(set(passed.tolist())):
                    at = passed == e
                    within[at] = permute(within[at], size=size, key=key_of(self.seed, k, e))
            sample[mine], epoch[mine] = within, passed
        return source, sample, epoch

    @property
    def block(self) -> int:
        """Samples of one block: a power of two in which the smallest source has at least two."""
        smallest = min(self.weights) / sum(self.weights)
        return max(SMALLEST_BLOCK, 1 << (int(2 / smallest)).bit_length())

    def _source(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each global sample, and how many samples of that source came before it."""
        if len(self.sizes) == 1:
            return np.zeros_like(index), index.copy()
        source, ordinal = np.empty_like(index), np.empty_like(index)
        block, within = np.divmod(index, self.block)
        for b in np.unique(block):
            at = np.flatnonzero(block == b)
            source[at], ordinal[at] = self._in_block(int(b), within[at])
        return source, ordinal

    def _in_block(self, block: int, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        before = self._taken(block)
        ends = np.cumsum(self._taken(block + 1) - before)
        starts = np.concatenate([[0], ends[:-1]])
        key = key_of(self.seed, -1, block)
        place = permute(within, size=self.block, key=key)
        source = np.searchsorted(ends, place, side="right")
        if self.shuffle:
            return source, before[source] + place - starts[source]
        # Read in order: a sample's rank is the number of samples of its source before it in the block.
        upto = np.searchsorted(ends, permute(np.arange(within.max() + 1), size=self.block, key=key), side="right")
        rank = np.array([np.count_nonzero(upto[:w] == s) for w, s in zip(within, source, strict=True)], dtype=np.int64)
        return source, before[source] + rank

    def _taken(self, blocks: int) -> np.ndarray:
        """Samples of each source in the first `blocks` blocks, int64; differences of rounded sums, so that they add up."""
        weights = [Fraction(w) for w in self.weights]
        total, running = sum(weights, Fraction(0)), Fraction(0)
        ends = [0]
        for weight in weights:
            running += weight
            ends.append(int(running * blocks * self.block / total))
        return np.diff(np.array(ends, dtype=np.int64))


def held_out(documents: int, *, fraction: float, seed: int, first: int = 0) -> np.ndarray:
    """Hash the documents [first, first + documents) and say which are for validation, bool [documents].

    A document's side depends on its number and the seed alone, so it stays there when the corpus grows.
    """
    hashes = hash_documents(documents, seed=seed, first=first)
    return hashes < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def hash_documents(documents: int, *, seed: int, first: int = 0) -> np.ndarray:
    """A 64-bit hash of each document number in [first, first + documents): uint64 [documents]."""
    numbers = np.arange(first, first + documents, dtype=np.uint64)
    return mix(mix(numbers) ^ np.uint64(key_of(seed, -2)))


def divided(count: int, *, fraction: float, seed: int) -> np.ndarray:
    """`held_out` for a count that fits in memory; of two or more neither side is empty, bool [count]."""
    side = held_out(count, fraction=fraction, seed=seed)
    spare = lone(count, fraction=fraction, seed=seed)
    if spare is not None:
        side[spare] = not side[spare]
    return side


def lone(count: int, *, fraction: float, seed: int) -> int | None:
    """The document to move to the other side, if the hash left one side empty: the one with the smallest or largest hash."""
    side = held_out(count, fraction=fraction, seed=seed)
    if count < 2 or not 0 < fraction < 1 or side.any() != side.all():
        return None
    hashes = hash_documents(count, seed=seed)
    return int(hashes.argmax() if side.all() else hashes.argmin())


def proportions(weights: Sequence[float]) -> np.ndarray:
    """The weights as shares that add up to 1, float64."""
    shares = np.array(weights, dtype=np.float64)
    return shares / shares.sum()
