"""Progress of a preparation: a bar with an estimate on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
log = logging.getLogger("distllm.data")


class Bar:
    """Counts up to `total`; a context manager."""

    def __init__(self, text: str, *, total: int, unit: str, show: bool) -> None:
        self.text, self.total, self.unit = text, max(total, 1), unit
        self.done, self.started, self.told = 0, time.monotonic(), time.monotonic()
        self.lines = show and not sys.stderr.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self.bar = (
            Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            if show and sys.stderr.isatty() else None
        )  # fmt: skip

    def __enter__(self) -> Bar:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.text, total=self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.lines and kind is None:
            log.info("%s: done in %.1f s", self.text, time.monotonic() - self.started)

    def advance(self, amount: int) -> None:
        """Count `amount` more."""
        self.done += amount
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif self.lines and now - self.told >= LINE_EVERY_S:
            left = (now - self.started) * (self.total - self.done) / max(self.done, 1)
            log.info("%s: %.0f %%, about %.0f s left", self.text, 100 * self.done / self.total, left)
            self.told = now
