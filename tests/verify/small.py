"""Verifications of tiny models, and modules of a user's own to verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distllm.config.schema import Config
from distllm.models.build import reset_parameters
from distllm.models.spec import ModelSpec
from distllm.verify.asked import Options
from distllm.verify.command import Verification
from distllm.verify.data import open_data
from tests.runs import tiny_config


def verification_of(folder: Path, *overrides: str, options: Options | None = None) -> Verification:
    """The verification of `tiny_config` with these overrides."""
    config: Config = tiny_config(folder, *overrides)
    return Verification(config, open_data(config, folder / "verify"), options or Options(timeout_s=60.0))


class Bow(nn.Module):
    """A causal model of a user's own: the mean of what came before, and two layers."""

    def __init__(self, vocab_size: int, hidden: int, alive: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, hidden)
        self.blocks = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(2)])
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab_size)
        self.alive = alive

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)[:, None]
        for block in self.blocks:
            x = x + self.dropout(torch.tanh(block(x)))
        logits: torch.Tensor = self.head(self.norm(x))
        return logits if self.alive else logits * 0.0


def bow(*, vocab_size: int, hidden: int = 16, alive: bool = True) -> ModelSpec:
    def build() -> nn.Module:
        return Bow(vocab_size, hidden, alive)

    return ModelSpec(
        name="bow", build=build, init=reset_parameters, blocks=("blocks",), embedding="embed", norm="norm", head="head",
        vocab_size=vocab_size,
    )  # fmt: skip


def plain(**values: Any) -> list[str]:
    """Overrides that make `tiny_config` a module of one's own, with these arguments."""
    args = ", ".join(f"{name}: {str(value).lower()}" for name, value in values.items())
    return [f"model={{spec: 'tests.verify.small:bow', spec_args: {{{args}}}}}"]
