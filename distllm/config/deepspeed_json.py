"""The JSON that DeepSpeed is configured with: an output of a config, never an input. It imports no torch.

Optimizer and schedule are not in it: DeepSpeed is given ours as objects, so that there is one set of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distllm.config.check import Resolved, resolve_layout
from distllm.config.errors import ConfigError
from distllm.config.schema import Config

NVME_NUMBERS = 10**8
"""Parameters of a rank whose state is in memory at a time, the rest in files: 4 buffers of 0.4 GB. DeepSpeed's own is 10^9."""


def deepspeed_json(config: Config, *, ranks: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for a config, with nothing left for it to derive.

    Args:
        config: without problems; `engine.name` is deepspeed.
        ranks: processes of the run.

    Raises:
        ConfigError: the engine is another one, or the batch does not fit the ranks.
    """
    if config.engine.name != "deepspeed":
        raise ConfigError([f"engine.name={config.engine.name}: has no DeepSpeed JSON; nearest: engine.name=deepspeed"])
    rendered = _rendered(config, resolve_layout(config, ranks))
    unresolved = list(_unresolved(rendered))
    assert not unresolved, f"left for DeepSpeed to guess: {unresolved}"  # it takes a default for "auto" and says nothing
    return rendered


def _rendered(config: Config, resolved: Resolved) -> dict[str, Any]:
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    for ours, theirs in (("offload_optimizer", "offload_optimizer"), ("offload_parameters", "offload_param")):
        if (device := getattr(engine, ours)) != "none":
            zero[theirs] = {"device": device}
    if engine.offload_optimizer == "nvme":
        assert engine.nvme_path is not None, "check_engine refuses it"
        zero["offload_optimizer"]["nvme_path"] = f"{engine.nvme_path}/{config.name}"
        zero["sub_group_size"] = NVME_NUMBERS
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
