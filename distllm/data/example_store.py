"""Examples on disk: for each field of an example a token store, whose document i belongs to example i."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distllm.data.store import TokenStore


@dataclass(frozen=True)
class ExampleStore:
    """The examples of one source, N of them, as token ids without special tokens (but those inside a conversation)."""

    fields: Mapping[str, TokenStore]
    """`text`, and as the task has them `pair`, `target`, `flags` (sft: 1 where a token of `text` is to be learned)."""
    labels: np.ndarray | None
    """int64 [N] class numbers, float64 [N] values, or None."""
    task: str = ""
    """multi_task: the task that the examples are for."""

    def __len__(self) -> int:
        return self.fields["text"].n_documents

    @cached_property
    def offsets(self) -> Mapping[str, np.ndarray]:
        """For each field where each example begins, and the number of tokens: int64 [N + 1]."""
        return {name: store.offsets for name, store in self.fields.items()}

    def ids(self, field: str, index: int) -> np.ndarray:
        """The token ids of a field of example `index`, int64 [n]."""
        start, end = self.offsets[field][index : index + 2].tolist()
        return self.fields[field].read(start, end - start).astype(np.int64)

    def lengths(self, field: str) -> np.ndarray:
        """How many tokens a field of each example has, int64 [N]."""
        return np.diff(self.offsets[field])
