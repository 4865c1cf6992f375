"""The JSON that DeepSpeed is configured with: an output of a config, never an input. It imports no torch.

Optimizer and schedule are not in it: DeepSpeed is given ours as objects, so that there is one set of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distllm.config.check import Resolved, resolve_layout
from distllm.config.errors import ConfigError
from distllm.config.schema import Config

NVME_NUMBERS = 10**8
"""Parameters of a rank whose state is in memory at a time, the rest in files: 4 buffers of 0.4 GB. DeepSpeed's own is 10^9."""

NOTHING_AHEAD = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
"""With parameters in files: each is read when a module needs it, and let go of after it.

What DeepSpeed 0.19 has begun to read ahead when an update comes, as after an evaluation, it takes for unread afterwards,
and ends the run with `param 20 already assigned swap buffer`. What it keeps for reuse, 10^9 parameters, keeps its buffer.
"""


@dataclass(frozen=True)
class FileBuffers:
    """The memory that parameters in files are read into: each takes one buffer for as long as a module computes with it."""

    count: int
    """Of buffers, all of one size."""
    size: int
    """Numbers in one: the largest part of a parameter that a rank has in files."""


def deepspeed_json(config: Config, *, ranks: int, buffers: FileBuffers | None = None) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for a config, with nothing left for it to derive.

    Args:
        config: without problems; `engine.name` is deepspeed.
        ranks: processes of the run.
        buffers: with `engine.offload_parameters=nvme`, what the model needs.

    Raises:
        ConfigError: the engine is another one, or the batch does not fit the ranks.
    """
    if config.engine.name != "deepspeed":
        raise ConfigError([f"engine.name={config.engine.name}: has no DeepSpeed JSON; nearest: engine.name=deepspeed"])
    rendered = _rendered(config, resolve_layout(config, ranks), buffers)
    unresolved = list(_unresolved(rendered))
    assert not unresolved, f"left for DeepSpeed to guess: {unresolved}"  # it takes a default for "auto" and says nothing
    return rendered


def _rendered(config: Config, resolved: Resolved, buffers: FileBuffers | None) -> dict[str, Any]:
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    for ours, theirs in (("offload_optimizer", "offload_optimizer"), ("offload_parameters", "offload_param")):
        if (device := getattr(engine, ours)) != "none":
            zero[theirs] = {"device": device}
        if device == "nvme":
            assert engine.nvme_path is not None, "check_engine refuses it"
            zero[theirs]["nvme_path"] = f"{engine.nvme_path}/{config.name}"
            zero["sub_group_size"] = NVME_NUMBERS
    if engine.offload_parameters == "nvme":
        assert buffers is not None, "they follow from the model"
        zero["offload_param"] |= {"buffer_count": buffers.count, "buffer_size": buffers.size, "max_in_cpu": 0}
        zero |= NOTHING_AHEAD
    rendered = {
        "train_batch_size": resolved.global_batch,
        "train_micro_batch_size_per_gpu": resolved.micro_batch,
        "gradient_accumulation_steps": resolved.accumulation,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision.compute == "bf16"},
        "fp16": {"enabled": config.precision.compute == "fp16", "loss_scale": 1.0},  # static: the dynamic one is ours
        "communication_data_type": "fp32",  # of gradients: summed in bf16, hundreds of ranks would lose digits
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own CPU Adam has to be compiled
        "steps_per_print": 10**9,
    }
    if resolved.pp > 1:  # with tp it would cut hidden states between stages, which have whole ones
        rendered["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return rendered


def _unresolved(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _unresolved(item, f"{key}.{name}" if key else name)
    elif value is None or value == "auto":
        yield key
