"""What to say of a file that is not there, or a folder that cannot be made: the key, its value, and the nearest that works."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from distllm.config.errors import ConfigError


def missing(
    key: str,
    path: str | Path,
    *,
    what: str = "no such file",
    wanted: Callable[[Path], bool] = Path.is_file,
    like: str | Path | None = None,
    hint: str | None = None,
) -> str:
    """The line that tells of a missing path.

    Args:
        key: the config's key, or the command line's option, that names it.
        path: as the user wrote it.
        what: the rule that it breaks.
        wanted: whether something that is there could be meant.
        like: what to look for the nearest of, where that is not the path as it is written.
        hint: of the user's own, such as where to get the file.
    """
    near = nearest_place(like or path, wanted=wanted)
    return f"{key}={_on_one_line(str(path))}: {what}; nearest: {_on_one_line(near)}" + (f"; {hint}" if hint else "")


def nearest_place(path: str | Path, *, wanted: Callable[[Path], bool] = Path.is_file) -> str:
    """The existing path whose name is closest, written as the user wrote this one; else the folder that was looked in.

    A wrong name of a folder on the way is put right too.

    Args:
        path: what is not there.
        wanted: whether something that is there could be meant.
    """
    asked = Path(path)
    here = Path(asked.anchor)
    parts = asked.parts[1:] if asked.is_absolute() else asked.parts
    for number, part in enumerate(parts):
        if part in ("..", "~") or (here / part).expanduser().exists():
            here = here / part
            continue
        names = _names(here, wanted=wanted if number + 1 == len(parts) else Path.is_dir)
        close = difflib.get_close_matches(part, names, n=1)
        if not close:
            break
        here = here / close[0]
    else:
        return str(here)
    return f"the folder {Path.cwd() if here == Path() else here}"  # on the working folder a relative path depends


def make_folder(folder: Path, *, key: str, value: str, near: str) -> None:
    """Make a folder of the user's choice, and those above it, unless they are there.

    Args:
        folder: what is made.
        key: the config's key, or the command line's option, that decides where.
        value: its value.
        near: one that works.

    Raises:
        ConfigError: the file system has no folders of that kind, as /proc has none.
        OSError: the disk is full, read-only, or another's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise ConfigError([f"{key}={_on_one_line(value)}: no folder can be made there; nearest: {near}"]) from None


def _names(folder: Path, *, wanted: Callable[[Path], bool]) -> list[str]:
    """What a folder holds; nothing where it cannot be read."""
    try:
        return sorted(entry.name for entry in folder.expanduser().iterdir() if wanted(entry))
    except OSError:
        return []


def _on_one_line(path: str) -> str:
    return path if path.isprintable() and path else repr(path)
