"""Samples by number: what the loader asks for.

The i-th sample is a pure function of (seed, i); which samples a step takes is a pure function of where it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from distllm.data.batch import Batch


@dataclass(frozen=True)
class StepPlan:
    """Which samples a step takes, and how they are dealt: rank r of R gets in its micro-batch a the rows
    samples.start + (a * R + r) * micro_batch + [0, micro_batch); rows beyond the samples are padding."""

    samples: range
    accumulation: int
    micro_batch: int
    """Rows of one micro-batch of one rank."""
    seq_len: int | None = None
    """While the length grows: cut every row into rows of this many tokens. None: leave them whole."""


class Samples(Protocol):
    """What a run trains and is measured on. The only data state is how many samples were consumed."""

    vocab_size: int

    @property
    def train_size(self) -> int:
        """Samples of an epoch, all sources together."""
        ...

    @property
    def validation_size(self) -> int:
        """Validation samples."""
        ...

    def step(self, start: int) -> StepPlan:
        """The step that begins with the global sample number `start`; a pure function."""
        ...

    def tokens(self, samples: range) -> int:
        """Input tokens of these training samples, without padding; encoder and decoder inputs together."""
        ...

    def train_batches(self, ids: Sequence[Sequence[int]]) -> list[Batch]:
        """A batch for each list of global sample numbers; -1 is a row of padding."""
        ...

    def validation_batch(self, ids: Sequence[int]) -> Batch:
        """The validation samples with these numbers; -1 is a row of padding."""
        ...

    def batch_bytes(self, size: int) -> int:
        """About how much memory a batch of `size` samples takes, in bytes."""
        ...

    def unigram_loss(self) -> float | None:
        """The validation loss of a model that knows only how frequent each token is; None where that means nothing."""
        ...
