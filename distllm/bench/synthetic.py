"""Samples of random tokens: nothing to prepare, and the same work for a model that learns the next token. B samples, S tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distllm.config.check import Resolved
from distllm.config.errors import ConfigError
from distllm.config.schema import Config
from distllm.data.batch import Batch
from distllm.data.samples import StepPlan

HELD = 64
"""Different samples; they come again and again."""


class RandomTokens:
    """What the loader asks for, of random ids."""

    def __init__(self, config: Config, *, resolved: Resolved, vocab_size: int) -> None:
        """Args:
        config: `data.seq_len` and `seed` are read.
        resolved: the batch.
        vocab_size: ids are below it.
        """
        self.vocab_size = vocab_size
        self._resolved, self._seq_len = resolved, config.data.seq_len
        generator = torch.Generator().manual_seed(config.seed)
        self._tokens = torch.randint(0, vocab_size, (HELD, self._seq_len + 1), generator=generator)

    @property
    def train_size(self) -> int:
        return HELD

    @property
    def validation_size(self) -> int:
        return HELD

    def step(self, start: int) -> StepPlan:
        r = self._resolved
        return StepPlan(range(start, start + r.global_batch), r.accumulation, r.micro_batch)

    def tokens(self, samples: range) -> int:
        return len(samples) * self._seq_len

    def train_batches(self, ids: Sequence[Sequence[int]]) -> list[Batch]:
        return [self.validation_batch(some) for some in ids]

    def validation_batch(self, ids: Sequence[int]) -> Batch:
        rows = self._tokens[[number % HELD for number in ids]]
        return Batch({"input_ids": rows[:, :-1].contiguous()}, {"labels": rows[:, 1:].contiguous()}, tuple(ids))

    def batch_bytes(self, size: int) -> int:
        return size * self._seq_len * 16

    def unigram_loss(self) -> float | None:
        return None


def vocabulary_of(config: Config) -> int:
    """The ids of the tokenizer that a config describes, without making it.

    Raises:
        ConfigError: random tokens cannot stand for the task's data.
    """
    if config.task.kind != "causal_lm":
        kind = config.task.kind
        raise ConfigError([f"--data=synthetic: random tokens are for task.kind=causal_lm, not {kind}; nearest: config"])
    own = config.model.sizes.get("vocab_size")
    if isinstance(own, int):
        return own
    tokenizer = config.data.tokenizer
    return {"bpe": tokenizer.vocab_size, "bytes": 257}.get(tokenizer.kind, 256 if tokenizer.kind == "chars" else 32_000)
