"""What a rank should send at one step: arithmetic on shapes and sizes, without running anything.

Symbols: N ranks of a group, A micro-batches, e bytes of a number. The shapes come from the model on meta; that is all it is
asked. Bytes are those that this rank sends, with ring or direct algorithms (`collectives.ring_bytes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from distllm.config.check_pipeline import needs_gathered, virtual_stages
from distllm.config.schema import Config
from distllm.models.spec import ModelSpec
from distllm.parallel.mesh import LOSS_AXES, SHARD_AXES
from distllm.parallel.tensor_heads import heads_of
from distllm.timeline.order import schedule_order
from distllm.verify.collectives import EXPERT_SHARD_AXES, Traffic
from distllm.verify.formulas_axes import context_parallel, expert_parallel, tensor_parallel
from distllm.verify.formulas_pipeline import pipeline
from distllm.verify.ledger import Ledger, Step
from distllm.verify.local_shapes import Part, Stages, local_numbers, parts_of, stages_of

MIB = 1 << 20
FIRST_BUCKET, BUCKET = 1 * MIB, 25 * MIB  # of DDP


def unpredictable(config: Config, spec: ModelSpec, model: nn.Module, sizes: Mapping[str, int]) -> str | None:
    """Why no formula says what a layout sends, or None."""
    inner = [axis for axis in ("tp", "cp", "pp", "ep") if sizes[axis] > 1]
    if not inner:
        return None
    if config.activation.mode != "none":
        return f"activation checkpointing repeats what {inner[0]} sends as far as a block is recomputed"
    if config.precision.compute not in ("fp64", "fp32"):
        return f"autocast decides what {inner[0]} sends in {config.precision.compute}"
    if sizes["cp"] > 1 and spec.hf_config is None:
        heads = [heads for heads in map(heads_of, model.modules()) if heads is not None and heads.dim is not None]
        if not heads:
            return "no module has num_heads and head_dim, which decide what cp sends"
    return None


def expected_traffic(step: Step) -> Traffic:
    """What this rank sends at one step, by group and kind."""
    ledger, stages = Ledger(step.sizes), stages_of(step)
    parts = parts_of(step, stages)
    shards = ledger.group(*SHARD_AXES)
    replicas = ledger.group("dp_replicate")
    inner = step.sizes["tp"] * step.sizes["pp"] > 1
    if shards[1] > 1 or (replicas[1] > 1 and inner):
        for part in parts:
            _fsdp(step, ledger, part, stages, shards=shards, replicas=replicas)
    elif replicas[1] > 1:
        _ddp(step, ledger, replicas=replicas)
    for part in parts:
        tensor_parallel(step, ledger, part)
        context_parallel(step, ledger, part)
    expert_parallel(step, ledger)
    pipeline(step, ledger, parts, stages)
    _norm(step, ledger, parts, sharded=shards[1] > 1)
    ledger.ring(ledger.group(*LOSS_AXES), "all_reduce", 2 * 8)  # [loss sum, count] in fp64
    return ledger.traffic


def _norm(step: Step, ledger: Ledger, parts: Sequence[Part], *, sharded: bool) -> None:
    """One scalar for each way in which parameters are cut, over each axis that cuts them; and one over the stages."""
    ways = {way for part in parts for way in part.ways(step)}
    for tp, ep in ways:
        if sharded:
            ledger.ring(ledger.group(*(EXPERT_SHARD_AXES if ep else SHARD_AXES)), "all_reduce", step.master_bytes)
        for axis, cut in (("tp", tp), ("ep", ep)):
            if cut:
                ledger.ring(ledger.group(axis), "all_reduce", step.master_bytes)
    ledger.ring(ledger.group("pp"), "all_reduce", step.master_bytes)


def _ddp(step: Step, ledger: Ledger, *, replicas: tuple[str, int]) -> None:
    """2 (N-1)/N P e: every gradient once a step, whatever A, in buckets."""
    sizes = [p.numel() * step.master_bytes for p in step.model.parameters() if p.requires_grad]
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


def _fsdp(
    step: Step, ledger: Ledger, part: Part, stages: Stages | None, *, shards: tuple[str, int], replicas: tuple[str, int]
) -> None:
    """A (N-1)/N P (2 e_p + e_g), less one gather of what is outside the blocks; shards are padded on dim 0.

    Across replicas 2 (R-1)/R (P/N) e_g, once a step. Of P, what tp, ep and pp leave on a rank. In a pipeline gradients are
    scattered once, and what a backward pass has gathered is still there for the forward pass after it.
    """
    count = len(step.micro)
    gathers, rest, scatters = count * (2 if step.config.layout.reshard_after_forward else 1), count, count
    if stages is not None:
        gathers, rest, scatters = gathers_of_stage(step, part.index), 1, 1
    experts = ledger.group(*EXPERT_SHARD_AXES)
    for block in part.blocks:
        dense = {name: p for name, p in block.items() if not step.is_expert(name)}
        _unit(step, ledger, dense, times=(gathers, scatters), shards=shards, replicas=replicas)
        for group in step.by_module({name: p for name, p in block.items() if step.is_expert(name)}):
            _unit(step, ledger, group, times=(gathers, scatters), shards=experts, replicas=replicas)
    _unit(step, ledger, part.rest, times=(rest, scatters), shards=shards, replicas=replicas)


def gathers_of_stage(step: Step, index: int) -> int:
    """How often a block of a stage is gathered in one step, from the order of its forward and backward passes."""
    layout = step.config.layout
    if not layout.reshard_after_forward or needs_gathered(layout.pp_schedule):
        return 1
    virtual = virtual_stages(layout.pp_schedule, layout.pp_virtual)
    order = schedule_order(layout.pp_schedule, pp=step.sizes["pp"], virtual=virtual, microbatches=len(step.micro))
    times, held = 0, False
    for work in (work for together in order[step.place["pp"]] for work in together if work.stage == index):
        times += not held
        held = work.kind != "F"
    return times


def _unit(
    step: Step, ledger: Ledger, unit: Mapping[str, nn.Parameter], *, times: tuple[int, int], shards: tuple[str, int],
    replicas: tuple[str, int],
) -> None:  # fmt: skip
    """One group of parameters that FSDP gathers, and whose gradients it scatters, so many times."""
    ranks, (gathers, scatters) = shards[1], times
    held = sum(local_numbers(step, name, p, ranks) for name, p in unit.items())
    learns = sum(local_numbers(step, name, p, ranks) for name, p in unit.items() if p.requires_grad)
    if held:
        ledger.ring(shards, "all_gather", ranks * held * step.compute_bytes, calls=gathers)
    if learns:
        ledger.ring(shards, "reduce_scatter", ranks * learns * step.master_bytes, calls=scatters)
        ledger.ring(replicas, "all_reduce", learns * step.master_bytes)
