"""What a rank should send at one step: arithmetic on shapes and sizes, without running anything.

Symbols: N ranks of a group, A micro-batches, e bytes of a number. The shapes come from the model on meta; that is all it is
asked. Bytes are those that this rank sends, with ring or direct algorithms (`collectives.ring_bytes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from distllm.config.check import Resolved
from distllm.config.schema import Config
from distllm.models.spec import ModelSpec
from distllm.parallel.mesh import AXES, LOSS_AXES, SHARD_AXES
from distllm.verify.collectives import Sent, Traffic, ring_bytes

MIB = 1 << 20
FIRST_BUCKET, BUCKET = 1 * MIB, 25 * MIB  # of DDP
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
    accumulation: int
    batch: tuple[int, int]
    """Rows and tokens of a micro-batch of one data-parallel rank."""

    @property
    def compute_bytes(self) -> int:
        return WIDTHS[self.config.precision.compute]

    @property
    def master_bytes(self) -> int:
        return 8 if self.config.precision.compute == "fp64" else 4


class Ledger:
    """Adds up traffic."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes, self.traffic = sizes, dict[tuple[str, str], Sent]()

    def group(self, axes: Sequence[str], name: str) -> tuple[str, int]:
        """What the group of some axes is called, and how many ranks it has: of one wide axis, the axis' name."""
        wide = [axis for axis in axes if self._sizes[axis] > 1]
        ranks = math.prod(self._sizes[axis] for axis in wide)
        return (wide[0] if len(wide) == 1 else name), ranks

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


def expected_traffic(step: Step) -> Traffic:
    """What this rank sends at one step, by group and kind."""
    ledger = Ledger(step.sizes)
    shards = ledger.group(SHARD_AXES, "shards")
    replicas = ledger.group(("dp_replicate",), "dp_replicate")
    if shards[1] > 1:
        _fsdp(step, ledger, shards=shards, replicas=replicas)
    elif replicas[1] > 1:
        _ddp(step, ledger, replicas=replicas)
    ledger.ring(ledger.group(LOSS_AXES, "loss"), "all_reduce", 2 * step.master_bytes)  # [loss sum, count]
    return ledger.traffic


def _ddp(step: Step, ledger: Ledger, *, replicas: tuple[str, int]) -> None:
    """2 (N-1)/N P e: every gradient once a step, whatever A, in buckets."""
    width = step.master_bytes
    sizes = [p.numel() * width for p in step.model.parameters() if p.requires_grad]
    for bucket in buckets(sizes[::-1]):
        ledger.ring(replicas, "all_reduce", bucket)


def buckets(sizes: Sequence[int]) -> list[int]:
    """How DDP packs gradients, in the order in which they come: a bucket is closed when it has reached its limit.

    Args:
        sizes: bytes of each gradient.

    Returns:
        The bytes of each bucket; the first one is small, so that sending begins early.
    """
    found, now, limit = [], 0, FIRST_BUCKET
    for size in sizes:
        now += size
        if now >= limit:
            found.append(now)
            now, limit = 0, BUCKET
    return [*found, now] if now else found


def _fsdp(step: Step, ledger: Ledger, *, shards: tuple[str, int], replicas: tuple[str, int]) -> None:
    """A (N-1)/N P (2 e_p + e_g), less one gather of what is outside the blocks; shards are padded on dim 0.

    Across replicas 2 (R-1)/R (P/N) e_g, once a step.
    """
    ranks, gathers = shards[1], 2 if step.config.layout.reshard_after_forward else 1
    reduce_bytes = step.master_bytes
    blocks, rest = units(step.model, step.spec)
    for unit, times in [*((block, gathers) for block in blocks), (rest, 1)]:
        numbers = ranks * sum(_shard_rows(p, ranks) for p in unit)
        learns = ranks * sum(_shard_rows(p, ranks) for p in unit if p.requires_grad)
        if not numbers:
            continue
        ledger.ring(shards, "all_gather", numbers * step.compute_bytes, calls=times * step.accumulation)
        if learns:
            ledger.ring(shards, "reduce_scatter", learns * reduce_bytes, calls=step.accumulation)
            ledger.ring(replicas, "all_reduce", learns // ranks * reduce_bytes)
    ledger.ring(shards, "all_reduce", step.master_bytes)  # the squared norm


def units(model: nn.Module, spec: ModelSpec) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """The parameters that FSDP gathers together: those of each block, and those outside."""
    blocks = [list(_own(block)) for path in spec.blocks for block in model.get_submodule(path).children()]
    inside = {id(p) for block in blocks for p in block}
    return blocks, [p for p in model.parameters() if id(p) not in inside]


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from module.parameters()


def _shard_rows(parameter: nn.Parameter, ranks: int) -> int:
    """Numbers of one rank's shard, cut on dim 0 and padded to equal rows."""
    return -(-parameter.shape[0] // ranks) * math.prod(parameter.shape[1:])


def sizes_of(resolved: Resolved) -> dict[str, int]:
    """Axis -> ranks."""
    return {axis: getattr(resolved, axis) for axis in AXES}
