"""Any transformers language model as a ModelSpec: by type and sizes, or from a folder or hub name with weights.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distllm.config.errors import ConfigError
from distllm.config.schema import ModelConfig
from distllm.models.flops import attention_windows, flops_per_token
from distllm.models.hf_config import (
    HEADS,
    Needs,
    check_positions,
    config_from_folder,
    config_from_type,
    counts_from_padding,
    first_line,
    max_positions,
)
from distllm.models.hf_folder import weights_folder
from distllm.models.hf_places import ep_plan, locate
from distllm.models.quiet import quiet
from distllm.models.spec import ModelSpec
from distllm.models.tp_plans import tp_plan


def hf_spec(model: ModelConfig, *, needs: Needs, packed: bool) -> ModelSpec:
    """Describe the transformers model that `model.type` or `model.path` names, with the head that the task needs.

    Args:
        model: the model section of the config, with `type` or `path`.
        needs: what the task and the data ask of it.
        packed: whether samples come with an attention mask that keeps documents apart.

    Returns:
        The spec; with `path` or `weights`, its `weights` is the folder to read.

    Raises:
        ConfigError: an unknown type or size, or a value that cannot be.
        DataError: a model folder that cannot be used.
    """
    weights = None
    with quiet():
        if model.path is not None:
            weights = weights_folder(model.path, trust=model.trust_remote_code)
            config = config_from_folder(weights, model, needs=needs)
        else:
            config = config_from_type(model, needs=needs)
    check_positions(config, model, seq_len=needs.seq_len)
    spec = spec_from_config(
        config, task=needs.task, attention=model.attention, weights=weights, trust=model.trust_remote_code
    )
    if packed:
        _check_packed(spec, needs.seq_len)
    return spec if needs.roles is None else replace(spec, pad_id=needs.roles.pad)


def spec_from_config(
    config: Any,
    *,
    task: str = "causal_lm",
    attention: str = "auto",
    weights: Path | None = None,
    trust: bool = False,
) -> ModelSpec:
    """Describe the language model of a transformers config.

    Args:
        config: a transformers config; a copy is kept.
        task: task.kind, which decides the head.
        attention: as in `model.attention`.
        weights: a folder with safetensors to start from, or None for random weights.
        trust: whether the model's class may come from Python code in its folder.

    Returns:
        The spec, whose blocks, embedding, norm, head and body were found on a meta copy of the model.
    """
    config = copy.deepcopy(config)
    config.use_cache = False  # a cache of keys and values is of use in generation only; `generate` asks for it

    def build() -> nn.Module:
        with quiet():
            module = _construct(copy.deepcopy(config), task, attention, trust)
        if task == "multi_task" and isinstance(getattr(module, "pooler", None), nn.Module):
            module.pooler = None  # the heads read hidden states: it would never learn
        if module.config._attn_implementation == "eager":
            module.register_forward_pre_hook(_additive_mask, with_kwargs=True)
        _choose_experts_product(module)
        return module

    with torch.device("meta"):
        skeleton = build()
    places = locate(skeleton, layers=getattr(config, "num_hidden_layers", None))

    def init(module: nn.Module) -> None:
        with torch.no_grad(), quiet():
            skeleton._init_weights(module)  # type: ignore[operator]

    # The class is known only now; export writes it into config.json.
    config.architectures = [type(skeleton).__name__]
    takes = inspect.signature(skeleton.forward).parameters
    return ModelSpec(
        name=config.model_type,
        build=build,
        init=init,
        blocks=places.blocks,
        embedding=places.embedding,
        norm=places.norm,
        head=places.head,
        tp_plan=tp_plan(skeleton),
        ep_plan=ep_plan(skeleton),
        vocab_size=config.vocab_size,
        max_seq_len=max_positions(config),
        flops_per_token=flops_per_token(config, skeleton, body=_body_alone(task, places.base)),
        weights=weights,
        hf_config=config,
        task=task,
        base=places.base,
        decoder_start=config.decoder_start_token_id if config.is_encoder_decoder else None,
        pad_id=getattr(config, "pad_token_id", None),
        token_types="token_type_ids" in takes and (getattr(config, "type_vocab_size", None) or 0) > 1,
    )


def _body_alone(task: str, base: str | None) -> str | None:
    """The path of what every token goes through, where the head sees one state a row."""
    return base if task in ("classification", "regression") else None


def _construct(config: Any, task: str, attention: str, trust: bool) -> Any:
    """The model of `config`, fp32, with the attention kernel asked for; `auto` is sdpa where the family has it."""
    make = HEADS[task].auto.from_config
    tries = ("sdpa", "eager") if attention == "auto" else (attention,)
    for kernel in tries:
        try:
            return make(config, attn_implementation=kernel, dtype=torch.float32, trust_remote_code=trust)
        except (ValueError, ImportError) as error:
            if kernel == tries[-1]:
                raise ConfigError(
                    [f"model.attention={attention}: {config.model_type}: {first_line(error)}; use model.attention=auto"]
                ) from error
    raise AssertionError("the last kernel returns or raises")


def _choose_experts_product(module: Any) -> None:
    """Loop over experts where torch's grouped product, transformers' default, cannot: it wants rows of 16 bytes or a multiple.

    In fp64 it cannot either; who trains in fp64 calls `set_experts_implementation("eager")`.
    """
    if getattr(module.config, "_experts_implementation", None) != "grouped_mm":
        return
    sizes = [size for p in module.parameters() if p.dim() == 3 for size in p.shape[1:]]
    if any(size % 8 for size in sizes):  # 8 values of bf16
        module.set_experts_implementation("eager")


def _additive_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Turn a bool mask [B, 1, S, S] (True: may look) into numbers: transformers' eager attention *adds* the mask."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.dtype == torch.bool:
        low = torch.finfo(torch.float16).min  # exp of it is 0 in every format, and no format overflows
        kwargs = {**kwargs, "attention_mask": torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, low)}
    return args, kwargs


def _check_packed(spec: ModelSpec, seq_len: int) -> None:
    """Refuse families that would not keep packed documents apart by our positions and mask."""
    config = spec.hf_config
    with torch.device("meta"):
        takes = inspect.signature(spec.build().forward).parameters
    windows = attention_windows(config)
    unable = windows is None or "position_ids" not in takes or getattr(config, "alibi", False)
    rule = None
    if unable or counts_from_padding(type(config)):
        rule = f"{config.model_type} cannot keep packed documents apart; use data.cross_documents=true"
    elif any(window is not None and window < seq_len for window in windows or ()):
        window = config.sliding_window
        rule = f"not together with a sliding window of {window} < data.seq_len; use model.sizes.sliding_window={seq_len}"
    if rule:
        raise ConfigError([f"data.cross_documents=false: {rule}"])
