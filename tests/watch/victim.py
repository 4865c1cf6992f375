"""A model that dies, stops, stands still, is slow or raises on one rank, at one step, once: what the environment says."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distllm.config.errors import DataError
from distllm.models.build import reset_parameters
from distllm.models.spec import ModelSpec

HIDDEN = 16


class Victim(nn.Module):
    """An embedding, two blocks and a head; the fault happens in the forward or the backward pass of a training step."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, HIDDEN)
        self.blocks = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(2)])
        self.head = nn.Linear(HIDDEN, vocab_size)
        self._steps = 0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        if self.training:
            self._steps += 1  # one micro-batch a step
            if self._is_due("forward"):
                suffer()
            if self._is_due("backward") and x.requires_grad:
                x.register_hook(lambda gradient: suffer())
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)

    def _is_due(self, where: str) -> bool:
        rank, step, place = os.environ.get("VICTIM", "-1 0 never").split()
        return os.environ.get("RANK") == rank and self._steps == int(step) and place == where


def suffer() -> None:
    """Do what the environment says, if no attempt has done so before."""
    try:
        Path(os.environ["VICTIM_ONCE"]).touch(exist_ok=False)
    except FileExistsError:
        return
    what = os.environ["VICTIM_HOW"]
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    elif what == "sleep":
        time.sleep(600.0)
    elif what == "loop":
        while True:
            pass
    elif what == "slow":
        time.sleep(4.0)
    elif what == "raise":
        raise DataError("text.txt, line 7: bad")
    elif what == "bug":
        raise KeyError("x")


def victim(*, vocab_size: int, seq_len: int) -> ModelSpec:
    """The spec."""
    return ModelSpec(
        name="victim", build=partial(Victim, vocab_size), init=reset_parameters, blocks=("blocks",), embedding="embed",
        head="head", vocab_size=vocab_size, max_seq_len=seq_len,
    )  # fmt: skip
