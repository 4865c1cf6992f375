"""The speed of training: tokens a second, waiting for data, MFU, memory; from clocks, without waiting for a device."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from distllm.track.peaks import peak_flops

__all__ = ["Meter", "peak_flops", "peak_memory"]


class Meter:
    """Measures the steps between two readings.

    On an accelerator the host runs ahead of the device. A step that logs reads the loss, which waits for the device, so
    read the meter after that and the window holds whole steps; pause after a reading too, or the device's work that is
    still queued falls into the pause.
    """

    def __init__(
        self,
        *,
        flops_per_token: float | None,
        peak: float | None,
        devices: int,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare a meter; its first window begins with the first `waiting()`.

        Args:
            flops_per_token: model FLOPs of one input token, forward and backward; None when unknown.
            peak: FLOP/s of one device, from `peak_flops`; None when unknown, and then there is no MFU.
            devices: devices of the whole run.
            device: whose memory to report; None or a CPU is this process's own.
            clock: seconds; for tests.
        """
        self._flops_per_token, self._peak, self._devices = flops_per_token, peak, devices
        self._device = device
        self._clock = clock
        self._begin: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._tokens = self._steps = 0
        self._waited = self._paused = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around taking the next step's batches."""
        begin = self._clock()
        if self._begin is None:
            self._begin = begin
        try:
            yield
        finally:
            self._waited += self._clock() - begin

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training: evaluation, sampling, saving. Its time counts for nothing."""
        begin = self._clock()
        try:
            yield
        finally:
            if self._begin is not None:
                self._paused += self._clock() - begin

    def step(self, tokens: int) -> None:
        """Count a step.

        Args:
            tokens: input tokens of the global batch, of all ranks.
        """
        self._tokens += tokens
        self._steps += 1

    def read(self) -> dict[str, float | None]:
        """The figures since the last reading; the next window begins now.

        Returns:
            tokens_per_s (of the whole run), step_time_s and data_wait_s (means over the steps), data_wait_share (of the
            step time, 0 to 1), mfu (0 to 1, None when unknown), peak_memory_bytes (of the device since the start of the
            process, or of the process itself). Without a step in the window, only the last.
        """
        now = self._clock()
        values: dict[str, float | None] = {}
        if self._begin is not None and self._steps:
            seconds = max(now - self._begin - self._paused, 1e-9)
            tokens_per_s = self._tokens / seconds
            mfu = None
            if self._flops_per_token is not None and self._peak is not None:
                mfu = tokens_per_s * self._flops_per_token / (self._peak * self._devices)
            values = {
                "tokens_per_s": tokens_per_s,
                "step_time_s": seconds / self._steps,
                "data_wait_s": self._waited / self._steps,
                "data_wait_share": self._waited / seconds,
                "mfu": mfu,
            }
        if self._begin is not None:
            self._begin = now
        self._reset()
        return {**values, "peak_memory_bytes": peak_memory(self._device)}


def peak_memory(device: torch.device | None) -> int:
    """The most memory held at once since the process began.

    Args:
        device: a CUDA device: bytes of tensors in torch's allocator. None or a CPU: the resident bytes of this process.

    Returns:
        Bytes.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage, where there is this: a child that a large process started would be told its parent's peak.
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
