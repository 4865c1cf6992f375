"""A table on the terminal that grows while rows come, with an estimate of what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

R = TypeVar("R")


class Growing(Generic[R]):
    """Shows rows as they come: a growing table with a bar on a terminal, a line each elsewhere."""

    def __init__(
        self, total: int, *, table: Callable[[Sequence[R]], Table], line: Callable[[R], str], silent: bool = False
    ) -> None:
        """Args:
        total: rows to come.
        table: the rows so far as a table.
        line: one row as a line.
        silent: show nothing, as a rank that is not the first.
        """
        self._total, self._table, self._line, self._silent = total, table, line, silent
        self._rows, self._began = list[R](), time.monotonic()
        console = Console()
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal and not silent:
            # No refreshing thread: ranks are forked from this process.
            self._live = Live(self._shown("starting"), console=console, auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._shown(None), refresh=True)
            self._live.stop()

    def starts(self, what: str) -> None:
        """Say what is under way, and how long all will take at the speed so far."""
        if self._live is not None:
            done, spent = len(self._rows), time.monotonic() - self._began
            left = f", about {spent / done * (self._total - done):.0f} s left" if done else ""
            self._live.update(self._shown(f"{done} of {self._total} done{left}; now {what}"), refresh=True)

    def add(self, row: R) -> None:
        """Show one more row."""
        self._rows.append(row)
        if self._live is None and not self._silent:
            print(self._line(row), flush=True)

    def _shown(self, caption: str | None) -> Table:
        table = self._table(self._rows)
        table.caption = caption
        if caption is not None:
            table.add_row(ProgressBar(total=max(1, self._total), completed=len(self._rows), width=30))
        return table
