"""What a layout cannot be together with: rules of the same shape as those of `check.py`, which calls them.

What only the model can say (its heads, its blocks, its experts) is checked when the model is known, in
`parallel/fits.py`; where `model.sizes` spells it out it is told here.
"""

from __future__ import annotations

from collections.abc import Iterator

from distllm.config.check_task import packed
from distllm.config.schema import Config

SEVERAL_STAGES = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
"""Schedules that give each rank more than one stage."""
V_SHAPED = ("zbv", "dualpipev")
"""Schedules whose ranks hold exactly two stages: one of the way down and one of the way up."""
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv", "dualpipev")
"""Schedules that split the backward pass."""


def virtual_stages(config: Config) -> int:
    """Stages of one rank: layout.pp_virtual with `auto` settled."""
    layout = config.layout
    if layout.pp_virtual != "auto":
        return layout.pp_virtual
    return 2 if layout.pp_schedule in SEVERAL_STAGES else 1


def _tensor(config: Config) -> Iterator[str]:
    layout, sizes = config.layout, config.model.sizes
    if layout.tp == 1:
        return
    heads = next((sizes[n] for n in ("num_attention_heads", "n_head", "n_heads", "num_heads") if n in sizes), None)
    if isinstance(heads, int) and heads % layout.tp:
        yield f"layout.tp={layout.tp}: must divide the {heads} attention heads; nearest: {_divisor(heads, layout.tp)}"
    if layout.sequence_parallel and packed(config) and config.data.seq_len % layout.tp:
        near = _multiple(config.data.seq_len, layout.tp)
        yield (
            f"data.seq_len={config.data.seq_len}: sequence_parallel cuts it over layout.tp={layout.tp}, which must divide it; "
            f"nearest: {near}, or layout.sequence_parallel=false"
        )
    if config.tune.train == "lora":
        yield f"layout.tp={layout.tp}: adapters (tune.train=lora) are not cut; nearest: 1, with layout.dp_shard"


def _context(config: Config) -> Iterator[str]:
    layout = config.layout
    if layout.cp == 1:
        return
    if config.task.kind != "causal_lm":
        yield f"layout.cp={layout.cp}: is for task.kind=causal_lm, not {config.task.kind}; nearest: 1"
    method, length = layout.cp_method, config.data.seq_len
    pieces = layout.cp if method == "ulysses" else 2 * layout.cp
    if length % pieces:
        what = f"{layout.cp} equal parts" if method == "ulysses" else f"{pieces} parts, two for each of {layout.cp} ranks"
        yield f"data.seq_len={length}: layout.cp={layout.cp} cuts it into {what}; nearest: {_multiple(length, pieces)}"
    if layout.cp_method != "ulysses" and config.model.dropout:
        yield f"model.dropout={config.model.dropout}: attention under layout.cp has no dropout; nearest: 0.0, or layout.cp=1"
    if config.train.seq_ramp:
        yield f"train.seq_ramp={config.train.seq_ramp}: rows that grow are not cut over layout.cp; nearest: 0, or layout.cp=1"


def _pipeline(config: Config) -> Iterator[str]:
    layout = config.layout
    if layout.pp == 1:
        return
    if config.task.kind not in ("causal_lm", "sft"):
        yield f"layout.pp={layout.pp}: is for task.kind=causal_lm and sft, not {config.task.kind}; nearest: 1"
    if config.distill.teacher is not None:
        yield f"layout.pp={layout.pp}: a teacher is not cut into stages; nearest: 1, with layout.dp_shard"
    if config.tune.train == "lora":
        yield f"layout.pp={layout.pp}: adapters (tune.train=lora) are not cut into stages; nearest: 1, with layout.dp_shard"
    if config.track.noise_scale:
        yield f"track.noise_scale=true: needs the gradient of a micro-batch alone, and layout.pp={layout.pp}; nearest: false"
    if (layout.pp_schedule == "csv") != (layout.pp_csv is not None):
        near = "1f1b" if layout.pp_csv is None else "layout.pp_csv=null"
        yield f"layout.pp_schedule={layout.pp_schedule}: pp_schedule csv and pp_csv go together; nearest: {near}"
    virtual = virtual_stages(config)
    if layout.pp_schedule in ("gpipe", "1f1b") and virtual != 1:
        near = "1, or layout.pp_schedule=interleaved_1f1b"
        yield f"layout.pp_virtual={virtual}: {layout.pp_schedule} has one stage a rank; nearest: {near}"
    if layout.pp_schedule in V_SHAPED and virtual != 2:
        yield f"layout.pp_virtual={virtual}: {layout.pp_schedule} has two stages a rank; nearest: 2"
    if layout.pp_schedule in ("interleaved_1f1b", "interleaved_zero_bubble") and virtual < 2:
        yield f"layout.pp_virtual={virtual}: {layout.pp_schedule} needs several stages a rank; nearest: 2"
    stages = layout.pp * virtual
    if layout.pp_split and len(layout.pp_split) != stages:
        yield f"layout.pp_split={list(layout.pp_split)}: must have an entry for each of the {stages} stages; nearest: []"
    sharded = layout.dp_shard != 1 or layout.ep > 1 or layout.cp > 1
    if layout.pp_schedule in ZERO_BUBBLE and layout.reshard_after_forward and sharded:
        yield (
            f"layout.reshard_after_forward=true: {layout.pp_schedule} runs the backward pass in two parts, between which "
            f"gathered weights must stay; nearest: false"
        )


def _experts(config: Config) -> Iterator[str]:
    layout, sizes = config.layout, config.model.sizes
    if layout.ep == 1:
        return
    experts = next((sizes[n] for n in ("num_local_experts", "num_experts") if n in sizes), None)
    if isinstance(experts, int) and experts % layout.ep:
        yield f"layout.ep={layout.ep}: must divide the {experts} experts; nearest: {_divisor(experts, layout.ep)}"
    if config.tune.train == "lora":
        near = "1, with layout.dp_shard"
        yield f"layout.ep={layout.ep}: adapters (tune.train=lora) are not spread with the experts; nearest: {near}"


def _unused(config: Config) -> Iterator[str]:
    """Settings of an axis that is not there."""
    layout, default = config.layout, type(config.layout)()
    for axis, names in (("pp", ("pp_schedule", "pp_virtual", "pp_split", "pp_csv")), ("cp", ("cp_method",))):
        for name in names:
            value = getattr(layout, name)
            if getattr(layout, axis) == 1 and value != getattr(default, name):
                yield f"layout.{name}={value}: says how layout.{axis} works, which is 1; nearest: {getattr(default, name)}"


def pipeline_fits(config: Config, *, accumulation: int) -> Iterator[str]:
    """What is wrong with the number of micro-batches for the schedule.

    Args:
        config: `layout` is read.
        accumulation: micro-batches of a step.
    """
    layout = config.layout
    if layout.pp == 1:
        return
    if layout.pp_schedule in ("interleaved_1f1b", "interleaved_zero_bubble") and accumulation % layout.pp:
        near = _multiple(accumulation, layout.pp)
        yield (
            f"train.accumulation={accumulation}: {layout.pp_schedule} takes micro-batches in rounds of layout.pp={layout.pp}; "
            f"nearest: {near}"
        )
    least = {"zbv": 2 * layout.pp, "dualpipev": 2 * layout.pp, "1f1b": layout.pp}.get(layout.pp_schedule, 1)
    if accumulation < least:
        yield (
            f"train.accumulation={accumulation}: {layout.pp_schedule} over {layout.pp} ranks needs at least {least} "
            f"micro-batches; nearest: {least}"
        )


def _divisor(value: int, near: int) -> int:
    """The divisor of `value` nearest to `near`, the smaller of two."""
    return min((d for d in range(1, value + 1) if value % d == 0), key=lambda d: (abs(d - near), d))


def _multiple(value: int, of: int) -> int:
    return max(of, of * ((value + of // 2) // of))


LAYOUT_RULES = (_tensor, _context, _pipeline, _experts, _unused)
