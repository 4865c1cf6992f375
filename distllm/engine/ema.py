"""An exponential moving average of the weights, kept beside them on every rank's own shards.

Averaged weights lie nearer the middle of the region that the last steps wander about in (Polyak & Juditsky 1992;
Izmailov et al. 2018, arXiv 1803.05407), so they answer better than the last ones while the learning rate is still high.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distllm.engine.local import LocalParameters


class MovingAverage:
    """average = decay * average + (1 - decay) * weight, after every update that was taken.

    It starts as a copy of the weights, so there is no bias towards zero to correct. A parameter that does not learn has
    no average: it is its own.
    """

    def __init__(self, parameters: LocalParameters, *, decay: float) -> None:
        """Args:
        parameters: the local weights, with their first values.
        decay: the share of the average that an update keeps, in (0, 1).
        """
        self._parameters, self._decay = parameters, decay
        self.values = {name: local.detach().clone() for name, local in parameters.local.items()}
        """This rank's part of each average, shaped like the local parameter."""
        self.exchanged = False
        """Whether the averages are now in the weights' place, and the weights in `values`."""

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with the present weights."""
        for name, value in self.values.items():
            value.copy_(self._parameters.local[name])

    @torch.no_grad()
    def update(self) -> None:
        """Move a step towards the present weights."""
        assert not self.exchanged, "training inside `averaged`"
        weights: list[torch.Tensor] = [self._parameters.local[name] for name in self.values]
        if weights:
            torch._foreach_lerp_(list(self.values.values()), weights, 1.0 - self._decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Exchange the values of averages and weights; afterwards back, to the bit. Call on the present shards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """In place, because FSDP and DDP hold on to the memory; one tensor's copy at a time is all it needs."""
        self.exchanged = not self.exchanged
        for name, value in self.values.items():
            local = self._parameters.local[name].data
            weight = local.clone()
            local.copy_(value)
            value.copy_(weight)
