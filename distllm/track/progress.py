"""The progress bar of a run, on a terminal; and how the log says what is left of it."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """A bar with the time that is left. A context manager; off a terminal it does nothing."""

    def __init__(self, total: int, *, start: int = 0, terminal: bool = True, unit: str = "step") -> None:
        """Prepare the bar.

        Args:
            total: units of the whole run.
            start: units done before, by the run that is resumed; they do not count for the speed.
            terminal: whether this rank may draw; it draws only if the standard error stream is a terminal.
            unit: what is counted.
        """
        self._bars: Bars | None = None
        console = Console(stderr=True)
        if not terminal or not console.is_terminal or console.is_dumb_terminal:
            return
        self._bars = Bars(
            TextColumn(f"{unit}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            expand=True,
            refresh_per_second=2,  # drawing takes milliseconds: ten times a second would be felt
            redirect_stdout=sys.stdout.isatty(),  # what is piped to a file must not land on the terminal
            redirect_stderr=True,  # the log's lines pass above the bar
        )
        self._task = self._bars.add_task("", total=total, completed=start, text="")

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, step: int, text: str | None = None) -> None:
        """Set the bar.

        Args:
            step: units done.
            text: what to say beside it, such as the loss; None leaves what is there.
        """
        if self._bars is None:
            return
        if text is None:
            self._bars.update(self._task, completed=step)
        else:
            self._bars.update(self._task, completed=step, text=text)


def clock_face(seconds: float) -> str:
    """A time as the bar shows it: 12:30 is minutes and seconds, 3:12:30 has hours before them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
