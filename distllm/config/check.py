"""What cannot combine: one table of rules over a whole config, and the arithmetic of the layout and the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from distllm.config.check_layout import LAYOUT_RULES, pipeline_fits, schedule_file
from distllm.config.check_task import TABLES, TASK_RULES
from distllm.config.errors import ConfigError
from distllm.config.kinds import shown
from distllm.config.schema import Config, ScheduleConfig, SourceConfig

Rule = Callable[[Config], Iterator[str]]
INNER = ("pp", "ep", "cp", "tp")
"""The axes of the layout that are always spelled out."""


@dataclass(frozen=True)
class Resolved:
    """The layout and the batch with every `auto` settled for a number of ranks."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    pp: int
    ep: int
    dp_size: int
    """dp_replicate x dp_shard x ep: the ranks that read different samples."""
    micro_batch: int
    accumulation: int
    global_batch: int
    """micro_batch x accumulation x dp_size, in samples; with `train.batch_tokens` it says nothing."""

    @property
    def shards(self) -> int:
        """Into how many pieces the weights are cut, all in all."""
        return self.dp_shard * self.ep * self.cp * self.tp * self.pp

    def sizes(self) -> dict[str, int]:
        """The size of every mesh axis."""
        axes = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")
        return {axis: getattr(self, axis) for axis in axes}


def check(config: Config, *, world_size: int | None = None) -> list[str]:
    """All that cannot work in this config.

    Args:
        config: every value is legal by itself.
        world_size: the number of ranks, where it is known; None checks what does not depend on it.

    Returns:
        A line for each problem, `key=value: rule; nearest: ...`; empty when there is none.
    """
    problems = [problem for rule in RULES for problem in rule(config)]
    sizes, trouble = _axes(config, world_size)
    dp_size = sizes[0] * sizes[1] * config.layout.ep if sizes is not None else None
    if trouble:
        return [*problems, *trouble]
    (accumulation, _), trouble = _batch(config, dp_size)
    if not trouble and dp_size is not None:
        trouble = [*pipeline_fits(config, accumulation=accumulation), *schedule_file(config, accumulation=accumulation)]
    return [*problems, *trouble]


def resolve_layout(config: Config, world_size: int) -> Resolved:
    """Settle the mesh axes and the batch for `world_size` ranks.

    Raises:
        ConfigError: they do not fit; each line names the nearest values that do.
    """
    sizes, problems = _axes(config, world_size)
    if sizes is None or problems:
        raise ConfigError(problems)
    (replicate, shard), layout = sizes, config.layout
    dp_size = replicate * shard * layout.ep
    (accumulation, global_batch), problems = _batch(config, dp_size)
    problems += list(pipeline_fits(config, accumulation=accumulation)) if not problems else []
    if problems:
        raise ConfigError(problems)
    return Resolved(
        dp_replicate=replicate, dp_shard=shard, cp=layout.cp, tp=layout.tp, pp=layout.pp, ep=layout.ep,
        dp_size=dp_size, micro_batch=config.train.micro_batch, accumulation=accumulation, global_batch=global_batch,
    )  # fmt: skip


def resolved_config(config: Config, world_size: int) -> Config:
    """The config with the batch of this world pinned, so that it continues with the same batch on any other world.

    `train.global_batch` becomes the number it is here, and `train.accumulation` auto, which follows from it.

    Raises:
        ConfigError: as `resolve_layout`.
    """
    batch = resolve_layout(config, world_size).global_batch
    if config.train.batch_tokens is not None:
        return config  # the tokens decide; how they are dealt does not matter
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch": batch, "accumulation": "auto"})})


def ranks_for(config: Config, *, devices: int) -> int:
    """The number of processes to start on one machine: as many as the layout spells out, else one a device.

    Args:
        config: its layout may leave one data-parallel axis `auto`.
        devices: accelerators of this machine; 0 on a CPU machine.
    """
    layout = config.layout
    axes = [layout.pp, layout.ep, layout.cp, layout.tp, layout.dp_replicate, layout.dp_shard]
    spelled = math.prod(size for size in axes if isinstance(size, int))
    return max(spelled, devices // spelled * spelled) if "auto" in axes else spelled


def _axes(config: Config, world_size: int | None) -> tuple[tuple[int, int] | None, list[str]]:
    """(dp_replicate, dp_shard) where they are known, and what is wrong with the layout."""
    layout = config.layout
    replicate, shard = layout.dp_replicate, layout.dp_shard
    if replicate == "auto" and shard == "auto":
        return None, ["layout.dp_replicate=auto: only one of dp_replicate and dp_shard can be auto; nearest: 1"]
    wide = {axis: size for axis in INNER if (size := getattr(layout, axis)) > 1}
    inner = math.prod(wide.values())
    if world_size is not None and world_size % inner:
        return None, [_inner_misfit(wide, world_size)]
    rest = None if world_size is None else world_size // inner
    beside = "".join(f" x {axis} {size}" for axis, size in wide.items())
    if replicate != "auto" and shard != "auto":
        if rest in (None, replicate * shard):
            return (replicate, shard), []
        assert rest is not None
        share, over = divmod(rest, replicate)
        fit = f"layout.dp_shard={share}" if not over else f"layout.dp_replicate=1 layout.dp_shard={rest}"
        text = f"dp_replicate {replicate} x dp_shard {shard}{beside} = {replicate * shard * inner}"
        return None, [f"layout.dp_shard={shard}: {text} must equal the {_processes(world_size)}; nearest: {fit}"]
    if rest is None:
        return None, []
    fixed = shard if replicate == "auto" else replicate
    assert isinstance(fixed, int)
    if rest % fixed:
        name = "dp_shard" if replicate == "auto" else "dp_replicate"
        near = min((d for d in range(1, rest + 1) if rest % d == 0), key=lambda d: (abs(d - fixed), d))
        return None, [f"layout.{name}={fixed}{beside}: must divide the {_processes(world_size)}; nearest: {near}"]
    return ((rest // fixed, fixed) if replicate == "auto" else (fixed, rest // fixed)), []


def _inner_misfit(wide: Mapping[str, int], world_size: int) -> str:
    """The line for axes whose product does not divide the world; the widest one is told to change."""
    axis = max(wide, key=lambda name: wide[name])
    size, product = wide[axis], math.prod(wide.values())
    others = product // size
    fits = [d for d in range(1, world_size + 1) if world_size % (others * d) == 0] or [1]
    near = min(fits, key=lambda d: (abs(d - size), d))
    text = " x ".join(f"{name} {value}" for name, value in wide.items())
    return f"layout.{axis}={size}: {text} = {product} must divide the {_processes(world_size)}; nearest: {near}"


def _batch(config: Config, dp_size: int | None) -> tuple[tuple[int, int], list[str]]:
    """(accumulation, global batch), and what is wrong with the batch; an unknown `dp_size` must only divide."""
    train = config.train
    accumulation, wanted = train.accumulation, train.global_batch
    one = train.micro_batch * (dp_size or 1)
    if wanted is None:
        count = 1 if accumulation == "auto" else accumulation
        return (count, one * count), []
    product = f"micro_batch {train.micro_batch}"
    if accumulation == "auto":
        product += f" x data-parallel {dp_size}" if dp_size else ""
        if wanted % one == 0:
            return (wanted // one, wanted), []
        text = f"must be a multiple of {product}" + (f" = {one}" if dp_size else "")
        near = f"{_multiple(wanted, one)}{_smaller_micro(wanted, train.micro_batch, dp_size)}"
        return (0, 0), [f"train.global_batch={wanted}: {text}; nearest: {near}"]
    whole = one * accumulation
    product += f" x accumulation {accumulation}" + (f" x data-parallel {dp_size}" if dp_size else "")
    if wanted == whole or (dp_size is None and wanted % whole == 0):
        return (accumulation, wanted), []
    if dp_size is None:
        text, near = f"must be a multiple of {product} = {whole}", f"{_multiple(wanted, whole)}, or train.accumulation=auto"
    else:
        text, near = f"must be {product} = {whole}", f"{whole}"
        near += f", or train.accumulation={wanted // one}" if wanted % one == 0 else ""
    return (0, 0), [f"train.global_batch={wanted}: {text}; nearest: {near}"]


def _smaller_micro(wanted: int, micro_batch: int, dp_size: int | None) -> str:
    """The largest smaller micro-batch with which the global batch divides, as a second way out."""
    if dp_size is None or wanted % dp_size:
        return ""
    fit = next(size for size in range(min(micro_batch, wanted // dp_size), 0, -1) if wanted // dp_size % size == 0)
    return f", or train.micro_batch={fit}"


def _processes(count: int | None) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _multiple(value: int, of: int) -> int:
    return max(of, of * ((value + of // 2) // of))


# --- the table: each rule is a function of the whole config that yields a line for each problem -------------------------


def model_problems(config: Config) -> Iterator[str]:
    """What is wrong with the `model` section."""
    model = config.model
    given = [name for name in ("type", "path", "spec") if getattr(model, name) is not None]
    if not given:
        yield "model.type=null: exactly one of model.type, model.path and model.spec must be set; nearest: llama"
    for name in given[:1] if len(given) > 1 else []:
        yield (
            f"model.{name}={shown(getattr(model, name))}: exactly one of model.type, model.path and model.spec must be set, "
            f"and there is also model.{given[1]}; nearest: model.{name}=null"
        )
    if model.spec is not None and not _is_import_path(model.spec):
        yield f"model.spec={shown(model.spec)}: must be package.module:function; nearest: my_package.my_module:make_spec"
    if model.spec is not None and model.sizes:
        yield f"model.sizes={shown(model.sizes)}: is for model.type and model.path; nearest: model.spec_args"
    if model.spec is None and model.spec_args:
        yield f"model.spec_args={shown(model.spec_args)}: is for model.spec; nearest: model.sizes"
    if model.path is None and model.trust_remote_code:
        yield "model.trust_remote_code=true: is for model.path, where code can come with a model; nearest: false"
    if model.attention == "flash_attention_2" and config.device == "cpu":
        yield "model.attention=flash_attention_2: needs a GPU, and device is cpu; nearest: sdpa"
    elif model.attention == "flash_attention_2" and config.precision.compute == "fp32":
        yield "model.attention=flash_attention_2: computes in bf16 or fp16 only; nearest: sdpa, or precision.compute=bf16"
    elif model.attention == "flash_attention_2" and not config.data.cross_documents:
        yield "model.attention=flash_attention_2: takes no mask, which data.cross_documents=false needs; nearest: sdpa"


def _is_import_path(text: str) -> bool:
    module, _, function = text.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _model_fits_data(config: Config) -> Iterator[str]:
    sizes, data = config.model.sizes, config.data
    for name in ("max_position_embeddings", "n_positions"):
        limit = sizes.get(name)
        if isinstance(limit, int) and data.seq_len > limit:
            yield f"data.seq_len={data.seq_len}: must be at most model.sizes.{name}={limit}; nearest: {limit}"
    vocab = sizes.get("vocab_size")
    needed = {"bpe": data.tokenizer.vocab_size, "bytes": 256}.get(data.tokenizer.kind, 0)
    if isinstance(vocab, int) and vocab < needed:
        yield f"model.sizes.vocab_size={vocab}: must hold every id of the tokenizer; nearest: {needed}"


def _sources(config: Config) -> Iterator[str]:
    if not config.data.sources:
        yield "data.sources=[]: must hold at least one source; nearest: [{kind: embedded}]"
    for place, sources in (("data.sources", config.data.sources), ("data.validation.sources", config.data.validation.sources)):
        for index, source in enumerate(sources):
            yield from _source(f"{place}.{index}", source)


def _source(place: str, source: SourceConfig) -> Iterator[str]:
    kind, default = source.kind, SourceConfig()
    if kind == "embedded" and source.path is not None:
        fit = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".bin": "tokens"}
        near = next((k for ending, k in fit.items() if source.path.endswith(ending)), "text")
        yield f"{place}.path={shown(source.path)}: the embedded source has no path; nearest: {place}.kind={near}"
    if kind != "embedded" and not source.path:
        yield f"{place}.path={shown(source.path)}: kind {kind} needs a path; nearest: {place}.kind=embedded"
    if kind == "tokens" and source.path and source.path.endswith((".bin", ".idx")):
        yield f"{place}.path={shown(source.path)}: is the path without its ending; nearest: {source.path[:-4]}"
    only: dict[str, set[str]] = {"name": {"hub"}, "split": {"hub"}, "column": set(TABLES), "document": {"text"}}
    for name, kinds in only.items():
        value, usual = getattr(source, name), getattr(default, name)
        if value != usual and kind not in kinds:
            yield f"{place}.{name}={shown(value)}: is for kind {', '.join(sorted(kinds))}, not {kind}; nearest: {shown(usual)}"


def _tokenizer(config: Config) -> Iterator[str]:
    tokenizer = config.data.tokenizer
    if tokenizer.kind == "hf" and not tokenizer.path:
        yield (
            f"data.tokenizer.path={shown(tokenizer.path)}: kind hf needs a folder, a tokenizer.json or a hub name; "
            f"nearest: data.tokenizer.kind=bpe"
        )
    if tokenizer.kind != "hf" and tokenizer.path is not None:
        path = shown(tokenizer.path)
        yield f"data.tokenizer.path={path}: is for kind hf, not {tokenizer.kind}; nearest: data.tokenizer.kind=hf"
    has_tokens = any(source.kind == "tokens" for source in [*config.data.sources, *config.data.validation.sources])
    if has_tokens and tokenizer.kind not in ("hf", "bytes"):
        yield (
            f"data.tokenizer.kind={tokenizer.kind}: a source of kind tokens is already tokenised, so the tokenizer cannot be "
            f"learned from it; nearest: hf with data.tokenizer.path, or bytes"
        )


def _validation(config: Config) -> Iterator[str]:
    validation = config.data.validation
    if validation.sources:
        return
    if validation.fraction == 1.0:
        yield "data.validation.fraction=1.0: must be below 1, or nothing is left to train on; nearest: 0.5"
    if validation.fraction == 0.0:
        rule = "must be above 0, or there is nothing to evaluate on"
        yield f"data.validation.fraction=0.0: {rule}; nearest: 0.001, or data.validation.sources"


def _optimizer(config: Config) -> Iterator[str]:
    optim = config.optim
    for index, beta in enumerate(optim.betas):
        if beta == 1.0:
            yield f"optim.betas.{index}=1.0: must be below 1; nearest: {(0.9, 0.999)[index]}"
    for name, near in (("momentum", 0.9), ("alpha", 0.99)):
        if getattr(optim, name) == 1.0:
            yield f"optim.{name}=1.0: must be below 1; nearest: {near}"
    if optim.implementation == "fused" and optim.name in ("rmsprop", "lion"):
        yield f"optim.implementation=fused: {optim.name} has no fused update; nearest: foreach"


def warmup_steps(schedule: ScheduleConfig, *, steps: int) -> int:
    """The steps of warm-up in a run of `steps`; what `auto` stands for."""
    return min(100, steps // 10) if schedule.warmup == "auto" else schedule.warmup


def _schedule(config: Config) -> Iterator[str]:
    schedule, steps = config.schedule, config.train.steps
    warmup = warmup_steps(schedule, steps=steps)
    if warmup >= steps:
        yield f"schedule.warmup={schedule.warmup}: must be below train.steps={steps}; nearest: {steps - 1}"
    elif schedule.name == "wsd":
        free = (steps - warmup) / steps
        if schedule.decay_fraction == 0.0:
            yield f"schedule.decay_fraction=0.0: wsd needs a decay; nearest: {min(0.1, round(free, 3))}"
        elif schedule.decay_fraction > free + 1e-9:
            near = math.floor(free * 1000 + 1e-9) / 1000
            yield (
                f"schedule.decay_fraction={schedule.decay_fraction}: with schedule.warmup={warmup} of "
                f"train.steps={steps} at most {free:.3g} is left to decay in; nearest: {near}"
            )


def _checkpoints(config: Config) -> Iterator[str]:
    every, keep = config.checkpoint.every, config.checkpoint.keep_every
    if keep and not every:
        yield f"checkpoint.keep_every={keep}: needs checkpoint.every, which is 0; nearest: 0, or checkpoint.every={keep}"
    elif keep and keep % every:
        yield f"checkpoint.keep_every={keep}: must be a multiple of checkpoint.every={every}; nearest: {_multiple(keep, every)}"


def _device(config: Config) -> Iterator[str]:
    if config.device == "cpu" and config.precision.tf32:
        yield "precision.tf32=true: is for GPUs, and device is cpu; nearest: false"


def _places(config: Config) -> Iterator[str]:
    for key, value, near in (
        ("out", config.out, "runs"), ("data.store", config.data.store, "data_store"), ("resume", config.resume, "auto"),
    ):  # fmt: skip
        if not value.strip():
            yield f"{key}={value!r}: must not be empty; nearest: {near}"


RULES: tuple[Rule, ...] = (
    model_problems, _model_fits_data, _sources, _tokenizer, _validation, _optimizer, _schedule, _checkpoints, _device, _places,
    *TASK_RULES, *LAYOUT_RULES,
)  # fmt: skip
