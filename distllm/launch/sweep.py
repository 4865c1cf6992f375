"""A sweep: the runs of a job array, from `--sweep key=value,value`."""

from __future__ import annotations

from itertools import product

from distllm.config.errors import ConfigError
from distllm.launch.words import told

LIMIT = 1000


def grid(sweeps: list[str]) -> tuple[tuple[str, ...], ...]:
    """Every combination of the values, as overrides.

    Args:
        sweeps: `key=value,value` each; a comma within brackets does not separate.

    Raises:
        ConfigError: one does not parse, or there are too many runs.
    """
    axes = []
    for text in sweeps:
        key, equals, values = text.partition("=")
        choices = _split(values)
        if not key or not equals or not all(choices):
            raise ConfigError([f"--sweep={told(text)}: must be key=value,value; nearest: --sweep optim.lr=0.001,0.003"])
        if key in ("name", "out"):
            raise ConfigError(
                [f"--sweep={told(text)}: each run is named by its number in the array; nearest: another key"]
            )
        axes.append([f"{key}={value}" for value in choices])
    runs = tuple(product(*axes)) if axes else ()
    if len(runs) > LIMIT:
        raise ConfigError([f"--sweep: makes {len(runs):,} runs, and {LIMIT:,} are the most; nearest: fewer values"])
    return runs


def _split(values: str) -> list[str]:
    """Cut at the commas that are not inside brackets or braces."""
    found, depth = [""], 0
    for character in values:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found
