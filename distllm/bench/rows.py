"""A row of the table: a cell with its figures, or why it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distllm.bench.cells import AXES, Cell
from distllm.bench.figures import Figures, Point, Scaling, as_json, scaling
from distllm.bench.measure import NO_MEMORY
from distllm.config.check import resolve_layout
from distllm.verify.ranks import Broken

MEASURED, REFUSED, TOO_LARGE, BROKEN = "measured", "refused", NO_MEMORY, "broken"


@dataclass(frozen=True)
class Row:
    """What became of a cell."""

    cell: Cell
    status: str
    """MEASURED, REFUSED (a rule), TOO_LARGE (out of memory) or BROKEN."""
    why: str = ""
    """One line, unless it was measured."""
    figures: Figures | None = None
    scaling: Scaling | None = None
    seconds: float = 0.0
    """The whole cell, with building."""

    def as_json(self) -> dict[str, Any]:
        config, ranks = self.cell.config, self.cell.ranks
        told: dict[str, Any] = {
            "name": self.cell.name, "grid": dict(self.cell.point), "ranks": ranks, "status": self.status, "why": self.why,
            "engine": config.engine.name, "zero_stage": _zero_stage(self.cell),
            "layout": _layout(self.cell), "micro_batch": config.train.micro_batch, "seq_len": config.data.seq_len,
            "global_batch": _global_batch(self.cell), "precision": config.precision.compute,
            "activation": config.activation.mode, "compile": config.train.compile, "seconds": self.seconds,
        }  # fmt: skip
        told["figures"] = None if self.figures is None else as_json(self.figures)
        told["scaling"] = None if self.scaling is None else dict(vars(self.scaling))
        return told


def failed(cell: Cell, broken: Broken) -> Row:
    """The row of a cell that brought no figures."""
    if broken.problems:
        return Row(cell, REFUSED, broken.problems[0])
    if broken.reason.startswith(NO_MEMORY):
        return Row(cell, TOO_LARGE, broken.reason.removeprefix(f"{NO_MEMORY}: "))
    if broken.reason.endswith("died without a word"):
        return Row(cell, BROKEN, f"{broken.reason}, often because memory ran out")
    return Row(cell, BROKEN, broken.reason)


def scaled(rows: Sequence[Row]) -> list[Row]:
    """The rows with their scaling efficiency."""
    return [replace(row, scaling=found) for row, found in zip(rows, scaling([_point(row) for row in rows]), strict=True)]


def _point(row: Row) -> Point | None:
    """What scaling reads of a row: cells are of one group where only layout and batch differ."""
    if row.figures is None:
        return None
    config, batch = row.cell.config, _global_batch(row.cell)
    assert batch is not None
    train = config.train.model_copy(update={"micro_batch": 1, "accumulation": "auto", "global_batch": None})
    same = config.model_copy(update={"layout": type(config.layout)(), "train": train})
    return Point(same.model_dump_json(), row.figures.devices, batch, row.figures.tokens_per_s)


def _layout(cell: Cell) -> dict[str, int]:
    """Axis -> size, of axes with more than one rank."""
    if cell.refused:
        return {}
    sizes = resolve_layout(cell.config, cell.ranks).sizes()
    return {axis: sizes[axis] for axis in AXES if sizes[axis] > 1}


def _zero_stage(cell: Cell) -> int | None:
    engine = cell.config.engine
    return engine.zero_stage if engine.name == "deepspeed" else None


def _global_batch(cell: Cell) -> int | None:
    return None if cell.refused else resolve_layout(cell.config, cell.ranks).global_batch
