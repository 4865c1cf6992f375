"""SLURM's short form of node names, `n[01-03,7]`, written out."""

from __future__ import annotations

import re
from itertools import product

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
"""A host: a name, or an IPv4 address."""
_LIMIT = 100_000
_PART = re.compile(r"[^\[\],]+|\[[^\[\]]*\]")


def expand(text: str) -> list[str]:
    """The names that a node list stands for.

    Args:
        text: such as `n[01-03,7],gpu-[1-2]-[a,b]`; ranges keep their leading zeros.

    Returns:
        The names in order.

    Raises:
        ValueError: it does not parse; one line with the part that does not.
    """
    names: list[str] = []
    for word in _words(text):
        parts = _PART.findall(word)
        if not parts or "".join(parts) != word:
            raise ValueError(f"node list {text!r}: {word!r} does not parse; nearest: n[01-03,7]")
        choices = [_choices(part, text) if part.startswith("[") else [part] for part in parts]
        names += ["".join(choice) for choice in product(*choices)]
        if len(names) > _LIMIT:
            raise ValueError(f"node list {text!r}: has more than {_LIMIT:,} names; nearest: n[01-03,7]")
    bad = next((name for name in names if not NAME.fullmatch(name)), None)
    if bad is not None or not names:
        raise ValueError(f"node list {text!r}: {bad or ''!r} is no host name; nearest: n[01-03,7]")
    return names


def tasks_of(text: str) -> list[int]:
    """The numbers that SLURM_TASKS_PER_NODE stands for, such as `2(x3),1`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_TASKS_PER_NODE={text}: does not parse; nearest: 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _words(text: str) -> list[str]:
    """Cut at the commas outside of brackets."""
    return [word for word in re.split(r",(?![^\[]*\])", text.strip()) if word]


def _choices(part: str, text: str) -> list[str]:
    found: list[str] = []
    for piece in part[1:-1].split(","):
        match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", piece)
        if match is None:
            if not re.fullmatch(r"[A-Za-z0-9]+", piece):
                raise ValueError(
                    f"node list {text!r}: {piece!r} in brackets is no number or range; nearest: n[01-03,7]"
                )
            found.append(piece)
            continue
        first, last = int(match[1]), int(match[2])
        if last < first or last - first > _LIMIT:
            raise ValueError(
                f"node list {text!r}: the range {piece} does not count up to {_LIMIT:,}; nearest: n[01-03,7]"
            )
        found += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return found
