"""What a layout cannot be together with: rules of the same shape as those of `check.py`, which calls them.

What only the model can say (its heads, its blocks, its experts) is checked when the model is known, by
`refuse_misfits` in `parallel/parallelize.py`; where `model.sizes` spells it out it is told here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distllm.config.check_activation import activation_problems
from distllm.config.check_context import context_problems
from distllm.config.check_engine import engine_problems
from distllm.config.check_expert import expert_problems, experts_in
from distllm.config.check_pipeline import schedule_problems, virtual_stages
from distllm.config.check_task import packed
from distllm.config.errors import ConfigError
from distllm.config.schedule_csv import read_order
from distllm.config.schema import Config

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
"""The names that families give their number of query heads."""
BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""The names that families give their number of blocks."""


def _tensor(config: Config) -> Iterator[str]:
    layout, sizes = config.layout, config.model.sizes
    if layout.tp == 1:
        return
    heads = next((sizes[n] for n in HEADS if n in sizes), None)
    if isinstance(heads, int) and heads % layout.tp:
        yield f"layout.tp={layout.tp}: must divide the {heads} attention heads; nearest: {_divisor(heads, layout.tp)}"
    if layout.sequence_parallel and packed(config) and config.data.seq_len % layout.tp:
        near = _multiple(config.data.seq_len, layout.tp)
        yield (
            f"data.seq_len={config.data.seq_len}: sequence_parallel cuts it over layout.tp={layout.tp}, which must divide it; "
            f"nearest: {near}, or layout.sequence_parallel=false"
        )
    first = config.train.seq_ramp_from
    if layout.sequence_parallel and config.train.seq_ramp and first % layout.tp:
        rule = f"sequence_parallel cuts the first rows over layout.tp={layout.tp}, which must divide them"
        yield f"train.seq_ramp_from={first}: {rule}; nearest: {_multiple(first, layout.tp)}, or layout.sequence_parallel=false"
    if config.distill.teacher is not None and layout.loss_parallel:
        yield "layout.loss_parallel=true: a student's logits must be whole to be compared with a teacher's; nearest: false"
    if config.distill.hidden and layout.sequence_parallel:
        rule = "distill.hidden compares the states between blocks, which it cuts"
        yield f"layout.sequence_parallel=true: {rule}; nearest: false"
    if config.tune.train == "lora":
        yield f"layout.tp={layout.tp}: adapters (tune.train=lora) are not cut; nearest: 1, with layout.dp_shard"


def _context(config: Config) -> Iterator[str]:
    layout, sizes = config.layout, config.model.sizes
    if layout.cp == 1:
        return
    if config.task.kind != "causal_lm":
        yield f"layout.cp={layout.cp}: is for task.kind=causal_lm, not {config.task.kind}; nearest: 1"
    heads = next((sizes[n] for n in HEADS if n in sizes), None)
    yield from context_problems(
        config.data.seq_len, cp=layout.cp, method=layout.cp_method, heads=heads if isinstance(heads, int) else None, tp=layout.tp
    )
    if config.model.dropout:
        yield f"model.dropout={config.model.dropout}: attention under layout.cp has no dropout; nearest: 0.0, or layout.cp=1"
    if config.distill.teacher is not None:
        yield f"layout.cp={layout.cp}: a teacher reads whole sequences; nearest: 1, with layout.dp_shard"
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
    if config.tune.train != "all":
        rule = "every stage must learn" if config.tune.train != "lora" else "adapters are not cut into stages"
        yield f"layout.pp={layout.pp}: {rule}, and tune.train={config.tune.train}; nearest: 1, with layout.dp_shard"
    ramp = config.train.batch_ramp
    if ramp and layout.pp_schedule != "gpipe":
        rule = f"begins with one micro-batch a rank, and {layout.pp_schedule} needs its number of them"
        yield f"train.batch_ramp={ramp}: {rule}; nearest: 0, or layout.pp_schedule=gpipe"
    if (layout.pp_schedule == "csv") != (layout.pp_csv is not None):
        near = "1f1b" if layout.pp_csv is None else "layout.pp_csv=null"
        yield f"layout.pp_schedule={layout.pp_schedule}: pp_schedule csv and pp_csv go together; nearest: {near}"
    virtual = virtual_stages(layout.pp_schedule, layout.pp_virtual)
    stages = layout.pp * virtual
    if layout.pp_schedule == "csv":
        return  # the file says how many stages there are
    blocks = next((config.model.sizes[n] for n in BLOCKS if n in config.model.sizes), None)
    if isinstance(blocks, int) and blocks < stages:
        rule = f"{stages} stages need a block each, and model.sizes has {blocks}"
        yield f"layout.pp={layout.pp}: {rule}; nearest: {max(1, blocks // virtual)}"
    elif layout.pp_split and len(layout.pp_split) != stages:
        yield f"layout.pp_split={list(layout.pp_split)}: must have a number for each of the {stages} stages; nearest: []"
    elif layout.pp_split and isinstance(blocks, int) and sum(layout.pp_split) != blocks:
        yield f"layout.pp_split={list(layout.pp_split)}: must add up to the model's {blocks} blocks; nearest: []"


def _experts(config: Config) -> Iterator[str]:
    layout = config.layout
    if layout.ep == 1:
        return
    experts = experts_in(config.model.sizes)
    if experts is not None or layout.tp > 1:
        yield from expert_problems(experts or layout.ep, ep=layout.ep, tp=layout.tp)
    if config.tune.train == "lora":
        near = "1, with layout.dp_shard"
        yield f"layout.ep={layout.ep}: adapters (tune.train=lora) are not spread with the experts; nearest: {near}"


def _noise(config: Config) -> Iterator[str]:
    for axis in ("pp", "ep", "cp", "tp"):
        if config.track.noise_scale and (size := getattr(config.layout, axis)) > 1:
            yield f"track.noise_scale=true: is measured on data-parallel ranks, and layout.{axis}={size}; nearest: false"
            return


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
    virtual = virtual_stages(layout.pp_schedule, layout.pp_virtual)
    batch = config.train.global_batch
    least = layout.pp if config.engine.name == "deepspeed" else 1  # its 1F1B also runs with fewer micro-batches than ranks
    yield from schedule_problems(
        layout.pp_schedule, pp=layout.pp, virtual=virtual, microbatches=max(accumulation, least),
        compiled=config.train.compile, samples=None if batch is None else batch // accumulation,
    )  # fmt: skip


def schedule_file(config: Config, *, accumulation: int) -> Iterator[str]:
    """What is wrong with a schedule from a file.

    Args:
        config: `layout` is read, and the file that it names.
        accumulation: micro-batches of a step.
    """
    layout = config.layout
    if layout.pp == 1 or layout.pp_schedule != "csv" or layout.pp_csv is None:
        return  # told by `_unused` and `_pipeline`
    try:
        read_order(Path(layout.pp_csv), pp=layout.pp, microbatches=accumulation)
    except ConfigError as error:
        yield from error.problems


def _divisor(value: int, near: int) -> int:
    """The divisor of `value` nearest to `near`, the smaller of two."""
    return min((d for d in range(1, value + 1) if value % d == 0), key=lambda d: (abs(d - near), d))


def _multiple(value: int, of: int) -> int:
    return max(of, of * ((value + of // 2) // of))


LAYOUT_RULES = (_tensor, _context, _pipeline, _experts, _noise, _unused, activation_problems, engine_problems)
