"""What the `engine` section cannot be together with: what DeepSpeed does not do, or does wrongly without saying so.

Each line names the engine or the value that can. DeepSpeed here is 0.19; where it computes something else than one
process does, the number beside the rule is what was measured (8 steps of a tiny model against plain torch).
"""

from __future__ import annotations

from collections.abc import Iterator

from distllm.config.kinds import shown
from distllm.config.schema import Config, EngineConfig

NATIVE = "engine.name=native"


def engine_problems(config: Config) -> Iterator[str]:
    """What is wrong with the `engine` section, or with others because of it."""
    if config.engine.name == "native":
        yield from _for_deepspeed_only(config.engine)
        return
    third = ", or engine.zero_stage=3" if config.layout.pp > 1 else ""  # which its pipeline has not, so it is not offered
    yield from (line.removesuffix(third) for line in _sharding(config.engine))
    yield from _axes(config)
    yield from _pipeline(config)
    yield from _precision(config)
    yield from _batch(config)
    yield from _native_only(config)


def _for_deepspeed_only(engine: EngineConfig) -> Iterator[str]:
    usual = EngineConfig()
    for name in ("zero_stage", "offload_optimizer", "offload_parameters", "nvme_path"):
        if (value := getattr(engine, name)) != getattr(usual, name):
            near = shown(getattr(usual, name))
            yield f"engine.{name}={value}: is for engine.name=deepspeed, not native; nearest: {near}, or engine.name=deepspeed"


def _sharding(engine: EngineConfig) -> Iterator[str]:
    if engine.zero_stage > 3:
        yield f"engine.zero_stage={engine.zero_stage}: ZeRO has stages 1, 2 and 3; nearest: 3"
    if engine.zero_stage == 0:
        # Without ZeRO, DeepSpeed 0.19 tells no gradient norm in fp32; in bf16 its unfused optimizer takes a step of zero
        # gradients at the start, so that Adam's bias correction is one step off (losses off by 4.6e-2); and with its
        # pipeline each stage is clipped by its own norm (1.1e-3).
        yield (
            "engine.zero_stage=0: DeepSpeed without ZeRO tells no gradient norm, and in bf16 takes wrong Adam steps; "
            f"nearest: 1, or {NATIVE} with layout.dp_replicate"
        )
    yield from _nvme(engine)
    if engine.offload_parameters != "none" and engine.zero_stage != 3:
        yield (
            f"engine.offload_parameters={engine.offload_parameters}: needs engine.zero_stage=3, and it is {engine.zero_stage}, "
            "where parameters are whole; nearest: none, or engine.zero_stage=3"
        )


def _nvme(engine: EngineConfig) -> Iterator[str]:
    """What offloading to files needs. Stages 1 and 2 of DeepSpeed take nvme of the optimizer for cpu without saying so."""
    asking = [key for key in ("offload_optimizer", "offload_parameters") if getattr(engine, key) == "nvme"]
    if engine.nvme_path is not None and not asking:
        near = "engine.offload_optimizer=nvme, or engine.offload_parameters=nvme"
        yield f"engine.nvme_path={engine.nvme_path}: is for nvme; nearest: null, {near}"
    if engine.offload_optimizer == "nvme" and engine.zero_stage != 3:
        yield (
            f"engine.offload_optimizer=nvme: needs engine.zero_stage=3, and it is {engine.zero_stage}, where DeepSpeed takes "
            "nvme for cpu; nearest: cpu, or engine.zero_stage=3"
        )
    for key in asking if engine.nvme_path is None else ():
        yield f"engine.{key}=nvme: needs engine.nvme_path, a folder; nearest: cpu"


def _axes(config: Config) -> Iterator[str]:
    layout = config.layout
    for axis in ("ep", "cp"):
        if (size := getattr(layout, axis)) > 1:
            rule = "engine.name=deepspeed has data-, tensor- and pipeline-parallel ranks"
            yield f"layout.{axis}={size}: {rule}; nearest: 1, or {NATIVE}"
    if layout.dp_replicate != 1:
        yield (
            f"layout.dp_replicate={layout.dp_replicate}: DeepSpeed shards over all data-parallel ranks; nearest: 1 with "
            f"layout.dp_shard=auto, or {NATIVE}"
        )
    if not layout.reshard_after_forward:
        yield f"layout.reshard_after_forward=false: DeepSpeed decides itself what stays gathered; nearest: true, or {NATIVE}"


def _pipeline(config: Config) -> Iterator[str]:
    layout, stage = config.layout, config.engine.zero_stage
    if layout.pp == 1:
        return
    if stage in (2, 3):
        rule = f"DeepSpeed's pipeline shards optimizer state alone, and layout.pp={layout.pp}"
        yield f"engine.zero_stage={stage}: {rule}; nearest: 1, or {NATIVE}"
    if layout.pp_schedule != "1f1b":
        yield f"layout.pp_schedule={layout.pp_schedule}: DeepSpeed's pipeline has one schedule; nearest: 1f1b, or {NATIVE}"


def _precision(config: Config) -> Iterator[str]:
    compute = config.precision.compute
    if compute == "fp16" and config.device == "cpu":
        yield "precision.compute=fp16: DeepSpeed has no fp16 on a CPU; nearest: bf16"
    elif compute == "fp64":
        yield f"precision.compute=fp64: DeepSpeed keeps its weights in fp32; nearest: fp32, or {NATIVE}"


def _batch(config: Config) -> Iterator[str]:
    train, fixed = config.train, "DeepSpeed's batch is a fixed number of samples"
    if train.batch_tokens is not None:
        yield f"train.batch_tokens={train.batch_tokens}: {fixed}; nearest: null, or {NATIVE}"
    if train.batch_ramp:
        yield f"train.batch_ramp={train.batch_ramp}: {fixed}; nearest: 0, or {NATIVE}"


def _native_only(config: Config) -> Iterator[str]:
    """What only the native engine does: a line for each value that differs from what DeepSpeed can have."""
    only = (
        ("train.ema", config.train.ema, 0.0, "keeps no moving average"),
        ("train.compile", config.train.compile, False, "is not compiled"),
        ("optim.l1", config.optim.l1, 0.0, "adds no penalty"),
        ("optim.l2", config.optim.l2, 0.0, "adds no penalty"),
        ("moe.balance", config.moe.balance, 0.0, "adds no losses of routers"),
        ("moe.z_loss", config.moe.z_loss, 0.0, "adds no losses of routers"),
        ("track.noise_scale", config.track.noise_scale, False, "measures no gradient noise"),
        ("tune.train", config.tune.train, "all", "trains all weights"),
        ("distill.teacher", config.distill.teacher, None, "has no teacher"),
    )
    for key, value, near, why in only:
        if value != near:
            yield f"{key}={shown(value)}: engine.name=deepspeed {why}; nearest: {shown(near)}, or {NATIVE}"
