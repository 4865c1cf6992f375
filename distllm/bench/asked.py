"""What was asked for on the command line, checked before anything heavy is imported."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distllm.config.errors import ConfigError
from distllm.config.kinds import kind_at, known_keys, shown

RANKS = "ranks"
"""A key of the grid that is none of the config: how many ranks."""
OURS = "distllm"
BARE, TRAINER, ACCELERATE = "bare", "hf-trainer", "accelerate"
ON_OUR_HOST = "+host"
"""At the end of a side's name: it runs under the memory allocator's settings that distllm's processes have."""
SIDES = (BARE, TRAINER, ACCELERATE, *(side + ON_OUR_HOST for side in (BARE, TRAINER, ACCELERATE)))
DATA = ("config", "synthetic")
MOST_CELLS = 256

Point = Mapping[str, str]
"""What one cell changes: key -> value, as on a command line."""


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    points: Sequence[Point] = ()
    """The grid; empty: a few cells that suit the machine."""
    steps: int = 10
    """Timed steps of a cell."""
    warmup: int = 3
    """Steps before them."""
    data: str = "config"
    against: Sequence[str] = ()
    rounds: int = 6
    """Turns that each side of `against` takes."""
    compare: Path | None = None
    timeout_s: float = 600.0
    """For one cell."""


def options_of(
    *, grid: Sequence[str], steps: int, warmup: int, data: str, against: str, rounds: int, compare: Path | None, timeout_s: float
) -> Options:
    """The options of a command line.

    Args:
        grid: `layout.tp=1,2 train.micro_batch=4,8`: every combination; several grids one after another.
        steps: timed steps of a cell.
        warmup: steps before them.
        data: one of DATA.
        against: some of SIDES, with commas.
        rounds: turns of each side.
        compare: an older record.
        timeout_s: seconds for one cell.

    Raises:
        ConfigError: values that cannot be, all at once.
    """
    problems: list[str] = []
    points: dict[tuple[tuple[str, str], ...], Point] = {}
    for text in grid:
        axes, wrong = parse_grid(text)
        problems += wrong
        if not wrong:
            points |= {tuple(point.items()): point for point in product(axes)}
    if len(points) > MOST_CELLS:
        problems.append(f"--grid: {len(points):,} cells; at most {MOST_CELLS} are run; nearest: fewer values")
    if data not in DATA:
        problems.append(f"--data={shown(data)}: must be {' or '.join(DATA)}; nearest: synthetic")
    sides = tuple(dict.fromkeys(side.strip() for side in against.split(",") if side.strip()))
    for side in sides:
        if side not in SIDES:
            near = difflib.get_close_matches(side, SIDES, n=1, cutoff=0.2) or ["bare"]
            known = f"{', '.join(SIDES[:3])}, each also with {ON_OUR_HOST}, with commas"
            problems.append(f"--against={shown(side)}: must be of {known}; nearest: {near[0]}")
    if compare is not None and not compare.is_file():
        problems.append(f"--compare={compare}: no such file; nearest: the bench.json of an earlier run")
    if problems:
        raise ConfigError(problems)
    return Options(list(points.values()), steps, warmup, data, sides, rounds, compare, timeout_s)


def kind_of(side: str) -> str:
    """The loop that a side runs, whatever its host's settings."""
    return side.removesuffix(ON_OUR_HOST)


def parse_grid(text: str) -> tuple[dict[str, list[str]], list[str]]:
    """(key -> its values, what is wrong) of `layout.tp=1,2 train.micro_batch=4,8`; commas inside brackets divide nothing."""
    axes: dict[str, list[str]] = {}
    problems = []
    for word in _divided(text, " "):
        key, equals, given = word.partition("=")
        values = [value.strip() for value in _divided(given, ",")]
        if not equals or not values:
            problems.append(f"--grid={shown(word)}: must look like key=value,value; nearest: layout.dp_shard=1,2")
        elif key != RANKS and kind_at(key) is None:
            near = difflib.get_close_matches(key, [RANKS, *known_keys()], n=1, cutoff=0.4) or ["layout.dp_shard"]
            problems.append(f"--grid={shown(word)}: unknown key; nearest: {near[0]}")
        elif key == RANKS and not all(value.isdecimal() and 1 <= int(value) <= 4096 for value in values):
            problems.append(f"--grid={shown(word)}: must be numbers from 1 to 4,096; nearest: {RANKS}=1,2")
        else:
            axes[key] = list(dict.fromkeys(values))
    if not axes and not problems:
        problems.append(f"--grid={shown(text)}: names no key; nearest: layout.dp_shard=1,2")
    return axes, problems


def product(axes: Mapping[str, Sequence[str]]) -> Iterator[Point]:
    """Every combination; the last key changes fastest."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _divided(text: str, by: str) -> list[str]:
    """The parts of a text between `by`, but not inside brackets; empty ones fall away."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == by and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]
