"""Words of a command and how a shell is kept from reading anything into them."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Sequence

SLURM_VALUE = re.compile(r"[A-Za-z0-9_.,:=@%+/*()&|!\[\]-]{1,200}")
"""What may stand in an #SBATCH line: no space, quote, dollar, backslash, `#` or newline."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
INTERFACE = re.compile(r"[A-Za-z0-9_.:=^,-]{1,100}")


class Shell(str):
    """A word that a script's shell expands: written by us, and never a user's text."""

    __slots__ = ()


def quoted(words: Sequence[str]) -> str:
    """The words as a shell line; all but `Shell` words are quoted."""
    return " ".join(word if isinstance(word, Shell) else shlex.quote(word) for word in words)


def joined(start: str, word: str, end: str = "") -> str:
    """A word with our own text before and after it; it stays a shell word if it was one."""
    return Shell(f"{start}{word}{end}") if isinstance(word, Shell) else f"{start}{word}{end}"


def told(text: str) -> str:
    """A user's text as one line of a message: control characters and lone surrogates are written out."""
    return ascii(text)[1:-1] if bad_character(text) is not None else text


def bad_character(text: str) -> str | None:
    """The first character that cannot be in a command, a script or a message: a control, a line break, half a character."""
    return next((c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)


def check_word(key: str, text: str, *, near: str) -> list[str]:
    """The problem of a word that is quoted later; empty when there is none."""
    bad = bad_character(text)
    if bad is None:
        return []
    return [f"{key}={told(text)}: must not hold the character U+{ord(bad):04X}; nearest: {near}"]


def check_form(key: str, text: str, form: re.Pattern[str], *, rule: str, near: str) -> list[str]:
    """The problem of a text that is not of the `form`; empty when there is none."""
    return [] if form.fullmatch(text) else [f"{key}={told(text)}: must be {rule}; nearest: {near}"]
