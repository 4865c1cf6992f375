"""A batch: what a model is given, what it should answer, and which samples it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE = -100
"""A target with this value has no weight in any loss or metric."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    B samples of S tokens for a causal language model: `inputs` has `input_ids` int64 [B, S] and, when attention must not
    cross documents, `position_ids` int64 [B, S] (from 0 in each document) and `attention_mask` bool [B, 1, S, S] (True:
    may look). `targets` has `labels` int64 [B, S], already shifted: `labels[b, s]` is the token after `input_ids[b, s]`,
    or `IGNORE`.
    """

    inputs: dict[str, torch.Tensor]
    """Keyword arguments of the model's forward."""
    targets: dict[str, torch.Tensor]
    """What the objective compares the outputs with."""
    sample_ids: tuple[int, ...]
    """The global sample numbers of the rows; a padded row has -1."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; from pinned memory the copy does not wait."""
        return Batch(
            {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()},
            {k: v.to(device, non_blocking=True) for k, v in self.targets.items()},
            self.sample_ids,
        )
