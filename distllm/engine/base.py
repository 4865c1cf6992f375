"""The engine seam: a whole training step, because a pipeline schedule or DeepSpeed offers no less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from distllm.checkpoint.chunk import Chunk
from distllm.data.batch import Batch


@dataclass(frozen=True)
class LossTerms:
    """What an objective makes of one micro-batch; never a mean, so that any split of the same tokens adds up to the same.

    All are scalars on the batch's device, of this rank alone until somebody adds them over ranks.
    """

    sum: torch.Tensor
    """The sum of the weighted losses; its gradient is the batch's."""
    count: torch.Tensor
    """The sum of the weights: what the sum is divided by, once, after adding over micro-batches and ranks."""
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further sums with the same count, for metrics: {"correct": ...}."""


Objective = Callable[[Any, Batch], LossTerms]
"""(model outputs, batch) -> LossTerms."""


@dataclass(frozen=True)
class Skipped:
    """A step that was not taken, because a loss or a gradient was not finite."""

    samples: range
    """The numbers of the samples of the global batch."""
    reason: str


@dataclass(frozen=True)
class StepOut:
    """What a step gives back, on the device: reading a tensor waits for it, so only a step that logs does."""

    loss: torch.Tensor
    """The mean loss over the global batch, a scalar, the same on every rank."""
    grad_norm: torch.Tensor
    """The global gradient norm before clipping, a scalar, the same on every rank."""
    lr: float
    skipped: tuple[Skipped, ...] = ()
    """Skipped steps that became known with this call; on a GPU one step later than they happened."""
    noise: torch.Tensor | None = None
    """Two estimates, [2]: the squared norm of the true gradient, and the variance of one sample's; where asked for."""


class Engine(Protocol):
    """Trains one model on one layout. Two implementations, no subclass of either."""

    updates: int
    """Optimizer steps taken: the position of the learning-rate schedule."""
    skips_in_a_row: int
    """Steps not taken since the last one that was."""
    unused: tuple[str, ...] | None
    """The parameters that the first step left without a gradient, as far as that is known; None before it."""
    device: torch.device
    """Where this rank computes."""
    parts_are_shared: bool
    """Whether the model answers only when every rank calls it, because ranks hold parts of it."""

    @property
    def step(self) -> int:
        """`updates`, and the last step if its verdict is not known yet."""
        ...

    def train_step(self, microbatches: Sequence[Batch], *, samples: range, noise: bool = False) -> StepOut:
        """Take one optimizer step on this rank's micro-batches of the global batch made of `samples`."""
        ...

    def settle(self) -> tuple[Skipped, ...]:
        """Wait for the last step and return the skips not yet told; after it `updates` is exact."""
        ...

    def eval_step(self, batch: Batch) -> LossTerms:
        """The loss terms of one micro-batch of this rank, without gradients, in eval mode."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """The moving averages in the weights' place, where there are any; afterwards the weights, to the bit."""
        ...

    def restart_average(self) -> None:
        """Begin the moving average with the present weights."""
        ...

    def inference(self) -> AbstractContextManager[nn.Module]:
        """The model for writing text: eval mode, the training precision, no gradients."""
        ...

    def state(self) -> Mapping[str, Chunk]:
        """The tensors of a checkpoint, this rank's pieces by name; loading fills them in place."""
        ...

    def facts(self) -> dict[str, Any]:
        """The scalars of a checkpoint, JSON."""
        ...

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over a checkpoint's scalars; its tensors are loaded into what `state()` gives."""
        ...

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and persistent buffer by name, whole, on the CPU, in fp32, one at a time.

        A collective call; ranks above 0 get empty tensors.
        """
        ...
