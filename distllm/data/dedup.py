"""Repeated texts: exact by hash, nearly equal by MinHash (Broder 1997) and locality-sensitive hashing.

The first of equals is kept, so what is dropped depends on the order of the texts, which is that of the config, and on nothing
else. Candidates that the hashing finds are compared by their true Jaccard similarity: no text is dropped by a false alarm.
A repeat can be missed: at a threshold of 0.8 one of similarity 0.85 in 1 of 40 cases, one of 0.9 in 1 of 1,000, an equal one
never.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np

from distllm.config.schema import DedupConfig

PERMUTATIONS = 128
SEED = 1  # not the run's: the same texts are dropped whatever the seed of the run, so that a store is shared


class Repeats:
    """The texts seen so far."""

    def __init__(self, config: DedupConfig) -> None:
        self.config = config
        self.exact: set[bytes] = set()
        self.near = _Near(config.near, ngram=config.ngram) if config.near else None

    def seen(self, text: str) -> bool:
        """Whether a text repeats an earlier one; if not, it is remembered."""
        if self.config.exact:
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest in self.exact:
                return True
            self.exact.add(digest)
        return self.near is not None and self.near.seen(text)


def drops(config: DedupConfig) -> bool:
    """Whether the config asks for any removal."""
    return config.exact or config.near > 0.0


def shingles(text: str, *, ngram: int) -> np.ndarray:
    """The hashes of the runs of `ngram` words of a text, sorted and without repeats: uint32 [n]; a shorter text is one run."""
    words = text.split()
    runs = {" ".join(words[i : i + ngram]) for i in range(max(1, len(words) - ngram + 1))}
    return np.unique(np.array([zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs], dtype=np.uint32))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The shared elements of two sorted sets over all their elements."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


class _Near:
    """An index of texts by bands of their MinHash."""

    def __init__(self, threshold: float, *, ngram: int) -> None:
        from datasketch import MinHash, MinHashLSH

        self.threshold, self.ngram = threshold, ngram
        # A missed repeat is worse than a candidate too many, which costs one comparison.
        self.index: Any = MinHashLSH(threshold=min(threshold, 0.99), num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self.empty: Any = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=int)
        self.kept: list[np.ndarray] = []

    def seen(self, text: str) -> bool:
        mine = shingles(text, ngram=self.ngram)
        sketch = self.empty.copy()
        sketch.update_batch(mine.tolist())
        for number in sorted(self.index.query(sketch)):
            if jaccard(mine, self.kept[number]) >= self.threshold:
                return True
        self.index.insert(len(self.kept), sketch)
        self.kept.append(mine)
        return False
