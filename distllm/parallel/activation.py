"""Activation checkpointing: recompute a block in the backward pass instead of keeping what it computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_activation_checkpointing(
    blocks: Sequence[nn.Module], *, mode: Literal["none", "full", "every"], every: int
) -> None:
    """Checkpoint all blocks, or each `every`-th, in place; names of modules and parameters stay.

    Args:
        blocks: the model's blocks in order.
        mode: none, full (all blocks) or every (blocks 0, k, 2k, ...).
        every: k.

    Source: Chen et al. 2016, arXiv 1604.06174.
    """
    if mode == "none":
        return
    step = 1 if mode == "full" else every
    for block in blocks[::step]:
        # The instance's forward shadows the class's, so that no wrapper module changes a name.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
