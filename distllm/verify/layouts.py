"""Which layouts to try: every product of axes for a number of ranks, or the ones asked for. What cannot combine, `check` says."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from distllm.config import yaml12
from distllm.config.check import check, resolve_layout
from distllm.config.errors import ConfigError
from distllm.config.kinds import shown
from distllm.config.schema import Config, LayoutConfig

AXES = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")  # as in parallel.mesh, which needs torch
MOST_RANKS = 4096
MOST_REAL = 8


@dataclass(frozen=True)
class Layout:
    """Sizes of axes, and how some of them work."""

    values: tuple[tuple[str, Any], ...]
    """Keys of the config's `layout` that are not at their default; axes of size 1 are left out."""

    @property
    def sizes(self) -> dict[str, int]:
        given = dict(self.values)
        return {axis: int(given.get(axis, 1)) for axis in AXES}

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def name(self) -> str:
        """Such as `dp_shard 2 x tp 2, cp_method ring`."""
        given = dict(self.values)
        axes = " x ".join(f"{axis} {given[axis]}" for axis in AXES if axis in given)
        others = [f"{key} {shown(value)}" for key, value in self.values if key not in AXES]
        return ", ".join([axes or "one process", *others])

    def config(self) -> LayoutConfig:
        return LayoutConfig(**{"dp_shard": 1, **dict(self.values)})


def layout_of(values: Mapping[str, Any]) -> Layout:
    """The layout with these values; axes of size 1 fall away."""
    kept = {key: value for key, value in values.items() if not (key in AXES and value == 1)}
    order = [*AXES, *sorted(k for k in kept if k not in AXES)]
    return Layout(tuple((key, kept[key]) for key in order if key in kept))


def products(ranks: int, *, axes: Sequence[str] = AXES) -> Iterator[Layout]:
    """Every way to write `ranks` as a product over the axes: one axis first, then two, and so on."""
    found = [layout_of(dict(zip(axes, sizes, strict=True))) for sizes in _factors(ranks, len(axes))]
    yield from sorted(found, key=lambda layout: (len(layout.values), [axes.index(key) for key, _ in layout.values]))


def _factors(number: int, places: int) -> Iterator[tuple[int, ...]]:
    if places == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, places - 1))


def parse_layouts(text: str) -> list[Layout]:
    """The layouts of `--layouts "tp=2,pp=2;dp_shard=4"`.

    Raises:
        ConfigError: an unknown key, a value that cannot be, or too many ranks; all of them at once.
    """
    layouts, problems = [], []
    for part in (piece.strip() for piece in text.split(";")):
        if part:
            values, wrong = _values(part)
            problems += wrong
            if not wrong:
                layouts.append(layout_of(values))
    problems += [
        f"--layouts={layout.name}: {layout.ranks:,} ranks; verify goes up to {MOST_RANKS:,}; nearest: {_fewer(layout)}"
        for layout in layouts
        if layout.ranks > MOST_RANKS
    ]
    if not layouts and not problems:
        problems = [f"--layouts={shown(text)}: names no layout; nearest: dp_shard=2"]
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(layouts))


def _values(part: str) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    known = list(LayoutConfig.model_fields)
    for item in part.split(","):
        left, equals, given = item.partition("=")
        key = left.strip().removeprefix("layout.")
        if not equals or key not in known:
            close = [*difflib.get_close_matches(key, known, n=1), "dp_shard"]
            return {}, [f"--layouts={shown(item.strip())}: unknown key; nearest: {close[0]}=2"]
        values[key] = yaml12.read(given.strip(), where="--layouts")
    try:
        LayoutConfig.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        near = {"cp_method": "ring", "pp_schedule": "1f1b"}.get(key, "2" if key in AXES else "true")
        return {}, [f"--layouts={key}={shown(values[key])}: {error.errors()[0]['msg'].lower()}; nearest: {key}={near}"]
    for name in AXES:
        if not isinstance(values.get(name, 1), int):
            return {}, [f"--layouts={name}={shown(values[name])}: must be a number of ranks; nearest: {name}=2"]
    return values, []


def _fewer(layout: Layout) -> str:
    """The layout with its widest axis cut down to what is allowed."""
    sizes = layout.sizes
    axis = max(sizes, key=lambda name: sizes[name])
    others = layout.ranks // sizes[axis]
    return ",".join(f"{a}={max(1, MOST_RANKS // others) if a == axis else n}" for a, n in sizes.items() if n > 1)


def parse_ranks(text: str) -> list[int]:
    """The numbers of `--ranks 1,2,4,8`.

    Raises:
        ConfigError: no numbers, or too large ones.
    """
    numbers = []
    for item in text.split(","):
        if not item.strip().isdecimal() or not 1 <= int(item) <= MOST_RANKS:
            raise ConfigError([f"--ranks={shown(text)}: must be numbers from 1 to {MOST_RANKS:,} with commas; nearest: 1,2,4,8"])
        numbers.append(int(item))
    return sorted(set(numbers))


def refusals(config: Config, ranks: int) -> list[str]:
    """Why a config with its layout cannot run on so many ranks: the rules of `check`; empty where it can."""
    problems = check(config, world_size=ranks)
    if problems:
        return problems
    try:
        resolve_layout(config, ranks)
    except ConfigError as error:
        return error.problems
    return []
