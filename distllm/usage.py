"""Numbers on the command line that an option does not take, told as those of a config are: value, rule, nearest.

The rules are read off the commands themselves, as typer words them otherwise from release to release.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from distllm.config.kinds import Kind, describe, nearest, shown


@dataclass(frozen=True)
class Number:
    """An option that takes a number."""

    option: str
    kind: Kind
    usual: float | None
    """What it is where it is not given."""


def number_problem(app: typer.Typer, command: str | None, name: str | None, words: Sequence[str]) -> str | None:
    """What is wrong with a number; None where it is no number, or nothing that is seen here is wrong with it.

    Args:
        app: whose commands there are.
        command: the name of the one that refused a value.
        name: of the parameter that was refused, as Python has it.
        words: the command line.
    """
    number = next((found for key, found in numbers_of(app, command) if key == name), None)
    if number is None:
        return None
    wrong = next((text for text in _given(number.option, words) if not _fits(number.kind, text)), None)
    if wrong is None:
        return None
    near = nearest(number.kind, wrong)
    if near is None:
        near = next(n for n in (number.usual, number.kind.at_least, 1) if n is not None)
    return f"{number.option}={shown(wrong)}: must be {describe(number.kind)}; nearest: {near:g}"


def numbers_of(app: typer.Typer, command: str | None) -> Iterator[tuple[str, Number]]:
    """The options of a command that take a number, by their names in Python."""
    for info in app.registered_commands:
        callback = info.callback
        if callback is not None and command in (info.name, callback.__name__):
            yield from _numbers(callback)


def _numbers(callback: Callable[..., Any]) -> Iterator[tuple[str, Number]]:
    hints, defaults = get_type_hints(callback, include_extras=True), inspect.signature(callback).parameters
    for name, hint in hints.items():
        if get_origin(hint) is not Annotated:
            continue
        kind, *more = get_args(hint)
        option = next((item for item in more if isinstance(item, OptionInfo)), None)
        plain = _plain(kind)[0]
        if option is None or plain not in (int, float):
            continue
        default = defaults[name].default
        spelled = next(iter(option.param_decls or ()), f"--{name.replace('_', '-')}")
        limits = Kind("whole" if plain is int else "number", at_least=option.min, at_most=option.max)
        yield name, Number(spelled, limits, default if isinstance(default, int | float) else None)


def _plain(hint: Any) -> list[Any]:
    """The types of `int`, `int | None` and `list[float] | None`, without None."""
    if hint is None or hint is type(None):
        return []
    return [plain for inner in get_args(hint) for plain in _plain(inner)] or [hint]


def _given(option: str, words: Sequence[str]) -> Iterator[str]:
    """The values that a command line gives an option."""
    for word, after in zip(words, [*words[1:], None], strict=True):
        if word == option and after is not None:
            yield after
        elif word.startswith(f"{option}="):
            yield word.partition("=")[2]


def _fits(kind: Kind, text: str) -> bool:
    try:
        number = float(text)
    except ValueError:
        return False
    low = kind.at_least is None or number >= kind.at_least
    high = kind.at_most is None or number <= kind.at_most
    return low and high and not math.isnan(number) and (kind.what == "number" or number.is_integer())
