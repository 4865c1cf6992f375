"""The log of a rank: `logs/rank-N.log` for each, and the terminal for rank 0."""

from __future__ import annotations

import logging
import sys
from pathlib import Path


def open_log(folder: Path, *, rank: int, terminal: bool) -> logging.Logger:
    """Open the log of a rank; a resumed run appends to it.

    Args:
        folder: the run folder; the lines go to `logs/rank-N.log` in it.
        rank: this rank's number.
        terminal: whether rank 0's lines also go to the standard error stream, where they pass above a progress bar.

    Returns:
        A logger of its own, outside of Python's tree of loggers, so that no library's settings change it.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.Logger(f"distllm.rank-{rank}", level=logging.INFO)
    file = _LogFile(path, mode="a", encoding="utf-8")
    file.setFormatter(_Lines("%(asctime)s %(message)s"))
    log.addHandler(file)
    if terminal and rank == 0:
        screen = _Terminal()
        screen.setFormatter(_Lines("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(screen)
    return log


def show_lines() -> None:
    """Show on the standard error stream what the loggers `distllm` and below say, from INFO on."""
    tree = logging.getLogger("distllm")
    if not any(isinstance(handler, _Terminal) for handler in tree.handlers):
        screen = _Terminal()
        screen.setFormatter(_Lines("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        tree.addHandler(screen)
        tree.setLevel(logging.INFO)


def close_log(log: logging.Logger) -> None:
    """Close the log's file."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


class _Lines(logging.Formatter):
    """Says `warning:` or `error:` in the lines that are one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING and not record.message.lower().startswith(record.levelname.lower()):
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


class _LogFile(logging.FileHandler):
    """Passes the first error up, such as a full disk, and is silent after it, so that the error can be told."""

    _broken = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._broken:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self._broken = True
        raise  # the error that emit caught: this is called inside its except block

    def close(self) -> None:
        try:
            super().close()
        except OSError:
            if not self._broken:
                raise


class _Terminal(logging.Handler):
    """Writes to what is the standard error stream at that moment: a living progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # nobody reads any more (`| head`); the file has the line
