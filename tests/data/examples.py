"""Example stores for tests: rows of ids, in which a token says where it is from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distllm.config.check import resolve_layout
from distllm.config.schema import Config
from distllm.data.example_store import ExampleStore
from distllm.data.examples import ExampleSamples
from distllm.data.store import TokenStore, dtype_for, write_store
from distllm.data.tokenizer import Roles

ROLES = Roles(eos=0, pad=1, begin=2, separator=3, mask=4)
FIRST = 10  # the first id that is no special token


@dataclass(frozen=True)
class Given:
    """What `ExampleSamples` reads of prepared data."""

    examples: tuple[ExampleStore, ...]
    validation_examples: tuple[ExampleStore, ...] = ()
    vocab_size: int = 5000


def store_of(
    folder: Path, name: str = "made", *, labels: Sequence[float] | None = None, task: str = "", **fields: Sequence[Sequence[int]]
) -> ExampleStore:
    """A store of these fields, each a list of rows of ids."""
    stores = {}
    for field, rows in fields.items():
        prefix = folder / f"{name}-{field}"
        write_store(prefix, [np.array(row, dtype=np.int64) for row in rows], dtype=dtype_for(70_000))
        stores[field] = TokenStore.open(prefix)
    given = None if labels is None else np.array(labels)
    return ExampleStore(stores, given, task)


def texts(count: int, *, seed: int = 0, longest: int = 20, first: int = FIRST) -> list[list[int]]:
    """`count` texts of 1 to `longest` tokens; text i begins with the token first + i."""
    draw = np.random.default_rng(seed)
    return [
        [first + i, *draw.integers(first, first + count, size=int(draw.integers(0, longest))).tolist()] for i in range(count)
    ]


def config_of(task: str | dict[str, Any], *, train: dict[str, Any] | None = None, seed: int = 1, **data: Any) -> Config:
    """A config of a task with these values in its data part."""
    kind = {"kind": task} if isinstance(task, str) else task
    return Config.model_validate({"task": kind, "seed": seed, "train": train or {}, "data": {"seq_len": 32, **data}})


def samples_of(given: Given, config: Config, *, ranks: int = 1, **more: Any) -> ExampleSamples:
    """The samples of stores for a number of ranks."""
    pinned = config.model_copy(update={"layout": config.layout.model_copy(update={"dp_replicate": ranks, "dp_shard": 1})})
    return ExampleSamples(given, config, resolved=resolve_layout(pinned, ranks), roles=ROLES, **more)  # type: ignore[arg-type]
