"""The verdict on a step, finite or not, brought to the host without waiting for what the device does next."""

from __future__ import annotations

import torch


class Verdict:
    """Two flags on their way from the device to the host."""

    def __init__(self, *, bad: torch.Tensor, loss: torch.Tensor, samples: range) -> None:
        """Start the copy.

        Args:
            bad: bool, a scalar on the device: the step must not be taken.
            loss: the step's loss, to say what was not finite.
            samples: the samples of the global batch.
        """
        self.samples = samples
        flags = torch.stack([bad, torch.isfinite(loss)])
        self._copied: torch.cuda.Event | None = None
        if flags.device.type != "cuda":
            self._flags = flags
            return
        self._flags = torch.empty(2, dtype=torch.bool, pin_memory=True)
        self._flags.copy_(flags, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def read(self) -> tuple[bool, bool]:
        """Whether the step was bad, and whether its loss was finite; waits for this step's copy and nothing after it."""
        if self._copied is not None:
            self._copied.synchronize()
        bad, loss_is_finite = self._flags.tolist()
        return bad, loss_is_finite
