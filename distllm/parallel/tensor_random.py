"""Random numbers under tensor parallelism.

Ranks of a tp axis start from the same seed and draw the same numbers, as dropout of what all of them have must. Dropout of
what each has for itself (probabilities of its heads, features of its part, tokens of its part of the sequence) needs
numbers of its own: a rank draws them from a stream that begins with a number from the common one and its rank.
"""

from __future__ import annotations

import torch
from torch import nn


class OwnRandomness:
    """Switches this rank between the common numbers and its own."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._common: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @torch.compiler.disable
    def begin(self) -> None:
        """Draw from the rank's own stream from here on."""
        if self._common is not None:
            return
        # From the CPU's generator, which all ranks have in the same state; on a GPU the host waits for nothing.
        seed = int(torch.randint(2**62, (), device="cpu"))
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._common = (torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None)
        torch.default_generator.manual_seed(seed + self._rank)
        if on_gpu:
            torch.cuda.manual_seed(seed + self._rank)

    @torch.compiler.disable
    def end(self) -> None:
        """Draw from the common stream again."""
        if self._common is None:
            return
        cpu, gpu = self._common
        self._common = None
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)

    def forget(self) -> None:
        """Begin a block: one that was left in the middle (a recomputation stops early) has put the common state back."""
        self._common = None


def has_dropout(module: nn.Module) -> bool:
    """Whether anything in a module drops values in training."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return True
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(part).items()):
            return True
    return False
