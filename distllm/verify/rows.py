"""One line of the table: a layout, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distllm.verify.collectives import Traffic
from distllm.verify.engines import NATIVE, EngineChoice
from distllm.verify.judge import QUANTITIES, Verdict
from distllm.verify.layouts import Layout


@dataclass(frozen=True)
class Row:
    """What became of one layout in one precision, under one engine."""

    layout: Layout
    precision: str
    engine: EngineChoice = NATIVE
    verdict: Verdict | None = None
    refused: tuple[str, ...] = ()
    """The rules that it breaks."""
    broken: str = ""
    """Why there is no verdict."""
    traffic: Sequence[Traffic] = ()
    """Of each rank, at the last step."""
    expected: Sequence[Traffic] = ()
    """Of each rank, by formula."""
    unpredictable: str = ""
    """Why there is no formula."""
    not_exposed: Mapping[str, str] = field(default_factory=dict)
    """What the engine does not show as the native one does, and how it is judged instead."""
    seconds: float = 0.0
    fake: bool = False
    """Whether only its shapes, placements and collectives were looked at, without the other ranks."""

    @property
    def kind(self) -> str:
        """What rows have to share to be judged alike: the precision, and the engine where it is another one."""
        return self.precision if self.engine == NATIVE else f"{self.engine.name} {self.precision}"

    @property
    def name(self) -> str:
        """Such as `dp_shard 2 x tp 2, deepspeed ZeRO 2, fp32`."""
        engine = "" if self.engine == NATIVE else f", {self.engine.label}"
        return self.layout.name + engine + ("" if self.precision == "fp64" else f", {self.precision}")

    @property
    def equal(self) -> bool:
        return self.verdict is not None and not self.verdict.problems

    @property
    def holds(self) -> bool:
        """Whether it counts as good: equal, or refused by a rule."""
        return self.equal or bool(self.refused)

    @property
    def worst(self) -> float:
        """The largest error of gradients and weights, as a share of what passes for a gradient."""
        if self.verdict is None:
            return -1.0
        return max(self.verdict.errors["gradient"], self.verdict.errors["weight"]) / self.verdict.bounds.gradient

    def sent(self) -> tuple[float, float]:
        """(measured, by formula): the bytes of the rank that sends most."""
        own = [float(sum(s.bytes for s in traffic.values())) for traffic in self.traffic]
        wanted = [float(sum(s.bytes for s in traffic.values())) for traffic in self.expected]
        return max(own, default=0.0), max(wanted, default=0.0)

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        found: dict[str, Any] = {
            "layout": dict(self.layout.values), "name": self.layout.name, "ranks": self.layout.ranks,
            "engine": self.engine.name, "zero_stage": self.engine.zero_stage, "precision": self.precision,
            "seconds": round(self.seconds, 2), "fake": self.fake,
        }  # fmt: skip
        if self.refused:
            return found | {"verdict": "refused", "rules": list(self.refused)}
        if self.verdict is None:
            return found | {"verdict": "broken", "reason": self.broken}
        shown = [name for name in QUANTITIES if self.fake or name in self.verdict.worst]
        return found | {
            "verdict": "equal" if self.equal else "different",
            "errors": {name: _finite(self.verdict.errors[name]) if name in shown else None for name in QUANTITIES},
            "tolerances": dict(vars(self.verdict.bounds)), "not_exposed": dict(self.not_exposed),
            "where": dict(self.verdict.worst),
            "problems": list(self.verdict.problems), "numbers_compared": self.verdict.compared,
            "weights_without_direction": list(self.verdict.unjudged), "formula_missing": self.unpredictable or None,
            "sent": _grouped(self.traffic), "formula": _grouped(self.expected),
        }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _grouped(traffic: Sequence[Traffic]) -> list[dict[str, Any]]:
    """What the ranks sent, those that sent the same together."""
    groups: list[dict[str, Any]] = []
    for rank, told in enumerate(_told(one) for one in traffic):
        group = next((group for group in groups if group["sent"] == told), None)
        if group is None:
            groups.append({"ranks": [rank], "sent": told})
        else:
            group["ranks"].append(rank)
    return groups


def _told(traffic: Traffic) -> Mapping[str, Any]:
    return {f"{kind} over {group}": {"calls": s.calls, "bytes": float(s.bytes)} for (group, kind), s in sorted(traffic.items())}
