"""Stopping on request: SIGINT, SIGTERM and SIGUSR1 ask the loop to save and end; they never end it in mid-step."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Self

from distllm.comm import Place

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def hold_sigterm(place: Place) -> None:
    """Let SIGTERM end this process at once before and after training, as ever, and not at all in between.

    While it trains, `StopRequest` catches it. When an error has ended that, a launcher may already send SIGTERM because
    another rank has died, and this rank has yet to tell why. So it waits too for a rank that is just telling that.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if place.phase in ("start", "end") and not place.telling:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


class StopRequest:
    """Catches the stop signals while it is entered. A second Ctrl-C, from an impatient user, interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        if hasattr(signal, "pthread_sigmask"):  # one that came while the rank was starting comes now
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name
