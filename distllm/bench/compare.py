"""A bench beside an older one: what is slower, or takes more memory, beyond the noise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distllm.config.errors import DataError

LEAST = 0.05
"""A change below this share is none, however quiet the machine."""
SIGMAS = 3.0
"""Standard errors of the difference of two medians that a change must exceed."""
MEMORY = 0.10
"""Growth of memory that is a regression."""


def read_record(path: Path) -> dict[str, Any]:
    """Read an older `bench.json`.

    Raises:
        DataError: it is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        cells = {cell["name"]: cell["figures"] for cell in record["cells"]}
        assert all(figures is None or figures["time"]["median"] > 0.0 for figures in cells.values())
    except (ValueError, KeyError, TypeError, AssertionError, OSError) as error:
        raise DataError(f"--compare={path}: is no record of distllm bench ({type(error).__name__})") from error
    assert isinstance(record, dict)
    return record


def regressions(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """A line for each cell, by name, that became worse beyond the noise.

    A step is slower when its median grew by more than LEAST and by more than SIGMAS standard errors of the difference.

    Args:
        old: a record.
        new: another.
    """
    before = {cell["name"]: cell for cell in old["cells"]}
    if not any(cell["name"] in before for cell in new["cells"]):
        yield "no cell is in both records: nothing was compared"
    for cell in new["cells"]:
        earlier = before.get(cell["name"])
        if earlier is None or earlier["figures"] is None:
            continue
        if cell["figures"] is None:
            yield f"{cell['name']}: was measured, and is {cell['status']} now: {cell['why']}"
            continue
        was, now = earlier["figures"], cell["figures"]
        grown = now["time"]["median"] - was["time"]["median"]
        noise = SIGMAS * math.hypot(now["time"]["error"], was["time"]["error"])
        if grown > max(noise, LEAST * was["time"]["median"]):
            yield (
                f"{cell['name']}: a step takes {1000 * now['time']['median']:.2f} ms, and took "
                f"{1000 * was['time']['median']:.2f} ms: {100 * grown / was['time']['median']:+.1f} %, "
                f"noise {100 * noise / was['time']['median']:.1f} %"
            )
        if now["memory"] > was["memory"] * (1.0 + MEMORY) and now["memory"] - was["memory"] > 1 << 24:
            yield f"{cell['name']}: takes {now['memory'] / 1e6:,.0f} MB, and took {was['memory'] / 1e6:,.0f} MB"


def remarks(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What makes the two records hard to compare: other hardware, versions, config."""
    for what in ("device", "cores", "gpus", "machine"):
        was, now = old.get("hardware", {}).get(what), new["hardware"][what]
        if was != now:
            yield f"{what} was {was}, and is {now}"
    for name, now in new["versions"].items():
        was = old.get("versions", {}).get(name)
        if was != now:
            yield f"{name} was {was}, and is {now}"
    if old.get("config_digest") != new["config_digest"]:
        yield "the config is another one"
