"""What the formulas of a step read, and where they write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from torch import nn

from distllm.config.schema import Config
from distllm.models.spec import ModelSpec
from distllm.parallel.expert import expert_modules
from distllm.verify.collectives import Sent, group_name, ring_bytes
from distllm.verify.trial import Micro, RankReport

WIDTHS = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Step:
    """All that the formulas read."""

    config: Config
    spec: ModelSpec
    model: nn.Module
    """On meta, tied, frozen where it is."""
    sizes: Mapping[str, int]
    place: Mapping[str, int]
    """This rank's coordinates."""
    micro: Sequence[Micro]
    """Its micro-batches."""
    everyone: Sequence[RankReport] = ()
    """All ranks: what the others send to this one's experts comes back from here."""

    @property
    def compute_bytes(self) -> int:
        return WIDTHS[self.config.precision.compute]

    @property
    def master_bytes(self) -> int:
        return 8 if self.config.precision.compute == "fp64" else 4

    @cached_property
    def expert_paths(self) -> tuple[str, ...]:
        """Modules of experts that ep spreads."""
        return tuple(expert_modules(self.model, plan=self.spec.ep_plan)) if self.sizes["ep"] > 1 else ()

    def is_expert(self, name: str) -> bool:
        """Whether a parameter is one of experts that ep has spread."""
        return any(name.startswith(f"{path}.") for path in self.expert_paths)

    def by_module(self, unit: Mapping[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
        """Parameters of experts by the module that they are in."""
        found: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in unit.items():
            found.setdefault(name.rpartition(".")[0], {})[name] = parameter
        return list(found.values())


class Ledger:
    """Adds up traffic."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes, self.traffic = sizes, dict[tuple[str, str], Sent]()

    def group(self, *axes: str) -> tuple[str, int]:
        """What the group over some axes is called, and how many ranks it has."""
        return group_name(axes, self._sizes), math.prod(self._sizes[axis] for axis in axes)

    def ring(self, group: tuple[str, int], kind: str, whole: int, *, calls: int = 1) -> None:
        """`calls` collectives of `whole` bytes each; nothing in a group of one."""
        name, ranks = group
        if ranks > 1 and calls:
            self._add((name, kind), Sent(calls, calls * ring_bytes(kind, whole=whole, ranks=ranks)))

    def direct(self, name: str, kind: str, size: int | Fraction, *, calls: int = 1) -> None:
        """`calls` sends or all-to-alls, each of `size` bytes that leave this rank."""
        if calls:
            self._add((name, kind), Sent(calls, Fraction(calls * size)))

    def _add(self, key: tuple[str, str], sent: Sent) -> None:
        self.traffic[key] = self.traffic.get(key, Sent(0, Fraction(0))) + sent
