"""Steps of examples of about equal length: a budget of tokens instead of a number of samples.

Positions of the sample order are taken in blocks; a block is sorted by length, cut into steps, and its steps are shuffled.
So the samples of a step are a pure function of (seed, where the step begins), and no layout changes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from distllm.config.errors import DataError
from distllm.data.order import key_of, permute

BLOCK = 8192  # samples that are sorted together: 128 steps of 64, so lengths within a step differ by about 1 %

Widths = Callable[[np.ndarray], np.ndarray]
"""The widths of the input and of the decoder's input of the samples at these positions of the order: int64 [n, sides]."""


@dataclass(frozen=True)
class Block:
    """The steps of one block."""

    first: int
    """Where the block begins."""
    positions: np.ndarray
    """The position in the order that each place of the block takes, int64 [n]."""
    begins: np.ndarray
    """The places where steps begin, and n: int64 [steps + 1]."""


class Buckets:
    """An order of samples in which a step's samples have about the same length."""

    def __init__(self, widths: Widths, *, epoch: int, budget: int, seed: int, shuffle: bool) -> None:
        """Divide an epoch into blocks of nearly equal size, so that a block does not cross the end of an epoch.

        Args:
            widths: of the samples at given positions of the order.
            epoch: samples of an epoch.
            budget: tokens of a step, padding included: rows x (longest input + longest decoder input).
            seed: of the shuffle.
            shuffle: whether steps of a block are shuffled; without it they go from short to long.
        """
        self._widths, self._epoch, self._budget, self._seed, self._shuffle = widths, epoch, budget, seed, shuffle
        self._blocks = max(1, round(epoch / BLOCK))
        self._made = lru_cache(maxsize=4)(self._make)  # a step is asked for its range, its ids and its tokens

    def step(self, start: int) -> range:
        """The places of the step that begins at `start`; from the middle of a step, the rest of it."""
        block = self._made(*self._block_of(start))
        after = int(np.searchsorted(block.begins, start - block.first, side="right"))
        return range(start, block.first + int(block.begins[after]))

    def positions(self, places: np.ndarray) -> np.ndarray:
        """The positions in the order that these places take, int64 [n]."""
        out = np.empty_like(places)
        todo = np.arange(len(places))
        while len(todo):
            block = self._made(*self._block_of(int(places[todo[0]])))
            inside = (places[todo] >= block.first) & (places[todo] < block.first + len(block.positions))
            out[todo[inside]] = block.positions[places[todo[inside]] - block.first]
            todo = todo[~inside]
        return out

    def _block_of(self, place: int) -> tuple[int, int]:
        """The block of a place: where it begins and ends."""
        epoch, within = divmod(place, self._epoch)
        k = ((within + 1) * self._blocks - 1) // self._epoch
        ends = [epoch * self._epoch + self._epoch * i // self._blocks for i in (k, k + 1)]
        return ends[0], ends[1]

    def _make(self, first: int, end: int) -> Block:
        positions = np.arange(first, end)
        widths = self._widths(positions)
        # By the longest side first, as it decides the step's width, then by the other.
        order = np.lexsort((widths.min(axis=1), widths.max(axis=1)))
        begins = cut_steps(widths[order], budget=self._budget)
        sizes = np.diff(begins)
        steps = np.arange(len(sizes))
        if self._shuffle:
            steps = permute(steps, size=len(steps), key=key_of(self._seed, -4, first))
        places = np.concatenate([np.arange(begins[s], begins[s + 1]) for s in steps])
        return Block(first, positions[order[places]], np.concatenate([[0], np.cumsum(sizes[steps])]))


def cut_steps(widths: np.ndarray, *, budget: int) -> np.ndarray:
    """Cut sorted samples into steps whose padded tokens are at most the budget.

    Rows that only make a step divisible by the ranks are not counted, so that the steps are the same on any number of them.

    Args:
        widths: padded widths of each side of each sample, int64 [n, sides].
        budget: tokens of a step; no sample is wider.

    Returns:
        Where steps begin, and n: int64 [steps + 1].
    """
    begins = [0]
    while begins[-1] < len(widths):
        some = widths[begins[-1] :][: budget // int(widths[begins[-1]].max()) + 1]  # a step has no more rows than that
        tokens = np.maximum.accumulate(some, axis=0).sum(axis=1) * np.arange(1, len(some) + 1)
        begins.append(begins[-1] + max(1, int(np.searchsorted(tokens, budget, side="right"))))
    return np.array(begins, dtype=np.int64)


def refuse_wide(widths: np.ndarray, *, budget: int, where: str, examples: np.ndarray) -> None:
    """Refuse a budget that some example does not fit in.

    Args:
        widths: padded tokens of each example, all sides together, int64 [N].
        budget: tokens of a step.
        where: the key of the source.
        examples: the number of each in its source, int64 [N].

    Raises:
        DataError: an example is wider than the budget.
    """
    if len(widths) and int(widths.max()) > budget:
        widest, example = int(widths.max()), int(examples[widths.argmax()])
        raise DataError(
            f"train.batch_tokens={budget}: example {example} of {where} takes {widest} tokens, padding included; "
            f"nearest: train.batch_tokens={widest}, or a lower data.seq_len with data.truncate"
        )
