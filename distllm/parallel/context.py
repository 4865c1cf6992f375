"""Context parallelism: each rank holds a part of every sequence, and attention alone looks beyond it.

The attention of a transformers model is replaced through its AttentionInterface, that of a user's own module where it
holds `distllm.models.attention.Attention`. Positions, labels and masks are cut by `sequence.cut_batch`.

Shapes: B batch, H query heads, K key heads, M tokens held, S tokens of the whole sequence, D width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distllm.config.errors import ConfigError
from distllm.models.attention import Attention
from distllm.models.flops import attention_windows
from distllm.parallel.blocks import Rule
from distllm.parallel.mesh import Mesh
from distllm.parallel.ring import gathered_attention, ring_attention
from distllm.parallel.sequence import Method
from distllm.parallel.ulysses import ulysses_attention

NAME = "distllm_context_parallel"
"""What our attention is called in transformers' AttentionInterface."""
METHODS: Mapping[Method, Callable[..., torch.Tensor]] = {
    "ring": ring_attention, "all_gather": gathered_attention, "ulysses": ulysses_attention,
}  # fmt: skip
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""What transformers' configs call the dropout of attention probabilities."""


@dataclass(frozen=True)
class ContextParallel:
    """What an attention module knows of its ranks; it hangs on the module as `context_parallel`."""

    method: Method
    group: dist.ProcessGroup
    """The ranks that hold the sequence."""
    plain: str
    """What transformers called the attention that was there before; empty for a user's own module."""


def apply_cp(model: nn.Module, mesh: Mesh, *, method: Method) -> nn.Module:
    """Let the attention of a model look over the tokens of all context-parallel ranks, in place; nothing where cp is 1.

    The model's forward then takes what `cut_batch` makes with the same `method`. Attention dropout is refused, because
    no two ranks would drop the same products; sliding windows and non-causal models work with every method.

    Args:
        model: the whole module or a pipeline stage of it, on meta or not, perhaps tensor-parallel: heads are counted as
            they come.
        mesh: its cp axis shares the sequence.
        method: ring and all_gather move keys and values, and take any number of heads; ulysses moves heads, and cp must
            divide those of a tensor-parallel rank.

    Returns:
        `model`, no parameter touched.

    Raises:
        ConfigError: a model whose attention cannot be replaced.
    """
    group = mesh.group("cp")
    if group is None:
        return model
    ranks = mesh.sizes["cp"]
    assert dist.get_rank(group) == mesh.coordinates()["cp"], "the group's order is the order of the sequence"
    theirs, own = transformers_attention(model), _own_attention(model)
    check_context(model, cp=ranks)
    for module in theirs:
        module.context_parallel = ContextParallel(method, group, module.config._attn_implementation)
    for module in own:
        module.context_parallel = ContextParallel(method, group, "")
    if theirs:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, torch.compiler.disable(_attention_of_transformers))
    _switch(model, on=True)
    return model


def check_context(model: nn.Module, *, cp: int) -> None:
    """Refuse a model whose sequences cannot be cut.

    Args:
        model: the whole module, or a stage of it, on any device.
        cp: context-parallel ranks, more than one.

    Raises:
        ConfigError: its attention cannot be replaced.
    """
    theirs = transformers_attention(model)
    if not theirs and not _own_attention(model):
        rule = f"{type(model).__name__} has no attention to cut: neither transformers' nor distllm.models.attention.Attention"
        raise ConfigError([f"layout.cp={cp}: {rule}; nearest: 1"])
    if problem := next(_refusals(model, theirs), None):
        raise ConfigError([f"layout.cp={cp}: {problem}"])


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Give a model the attention that it had before `apply_cp`, for whole sequences and caches: to generate.

    Every rank of the cp axis then computes the same on the same whole batch. Where cp is 1 nothing changes.
    """
    _switch(model, on=False)
    try:
        yield
    finally:
        _switch(model, on=True)


def transformers_attention(model: nn.Module) -> list[Any]:
    """The modules that look their attention up in transformers' AttentionInterface, by its conventions."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "is_causal", None), bool)
        and hasattr(getattr(module, "config", None), "_attn_implementation")
    ]


def _own_attention(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def _switch(model: nn.Module, *, on: bool) -> None:
    """Put our attention in (on) or that which was there before."""
    module: Any
    for module in model.modules():
        context = getattr(module, "context_parallel", None)
        if context is None:
            continue
        if not context.plain and on:
            module.forward = torch.compiler.disable(partial(_attention_of_a_module, module))
        elif not context.plain:
            del module.forward  # the class's own shows again
        elif module.config._attn_implementation != (wanted := NAME if on else context.plain):
            module.config._attn_implementation = wanted  # most often one config for all modules


def _refusals(model: nn.Module, attention: list[Any]) -> Iterator[str]:
    """Why the attention of a model cannot be replaced, and what works."""
    for config in {id(module.config): module.config for module in attention}.values():
        yield from _refusals_of_a_family(config, attention)
    families: list[Any] = [module for module in model.modules() if hasattr(type(module), "_supports_attention_backend")]
    for family in families:
        if not (family._supports_attention_backend and family._supports_flash_attn):
            # A family of whose attention flash kernels are told all in arguments tells ours all too.
            yield f"{family.config.model_type} has no attention that can be replaced; nearest: 1"
    # Of the classes, because the forward of a pipeline stage may be one of the instance's own.
    if not any("position_ids" in inspect.signature(type(module).forward).parameters for module in model.modules()):
        yield f"{type(model).__name__}.forward takes no position_ids, which say where its tokens stand; nearest: 1"


def _refusals_of_a_family(config: Any, attention: list[Any]) -> Iterator[str]:
    from distllm.models.hf_config import counts_from_padding  # imports transformers

    kind, windows = config.model_type, attention_windows(config)
    if config.is_encoder_decoder:
        yield f"{kind} is an encoder-decoder, whose two sequences are not cut; nearest: 1"
    if windows is None or getattr(config, "alibi", False) or counts_from_padding(type(config)):
        yield f"{kind} has layers or positions that cannot be cut along the sequence; nearest: 1"
    if getattr(config, "attn_logit_softcapping", None) or any(hasattr(module, "sinks") for module in attention):
        yield f"{kind} changes attention scores in a way that ours does not know; nearest: 1"
    if any(windows or ()) and not all(module.is_causal for module in attention):
        yield f"{kind} has a sliding window that also looks ahead; nearest: 1"
    for name in DROPOUTS:
        if value := getattr(config, name, 0.0):
            yield f"not together with dropout of attention probabilities, {name}={value}; nearest: model.sizes.{name}=0.0"


def _attention_of_transformers(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None,
    *, dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
    sliding_window: int | None = None, **rest: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention as AttentionInterface calls it: [B, H, M, D] and twice [B, K, M, D] to [B, M, H, D]."""
    changes = [name for name in ("softcap", "s_aux", "position_bias") if rest.get(name) is not None]
    assert not changes and dropout == 0.0, f"apply_cp should have refused {changes}, dropout {dropout}"
    causal = module.is_causal if is_causal is None else is_causal
    out = _attention(
        module.context_parallel, query, key, value, attention_mask, causal=causal, scale=scaling, window=sliding_window
    )
    return out.transpose(1, 2).contiguous(), None


def _attention_of_a_module(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    return _attention(
        module.context_parallel, query, key, value, attention_mask, causal=module.is_causal, scale=None, window=None
    )


def _attention(
    context: ContextParallel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    *, causal: bool, scale: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """[B, H, M, D] and twice [B, K, M, D] to [B, H, M, D], over the whole sequence.

    Args:
        mask: None or the short form that `cut_batch` makes, [B, 1, 1, S].
    """
    assert query.shape[2] == key.shape[2], "a cache of keys and values is for plain_attention"
    if mask is not None:
        length = dist.get_world_size(context.group) * query.shape[2]
        assert mask.shape[1:] == (1, 1, length) and not mask.is_floating_point(), f"no mask of cut_batch: {tuple(mask.shape)}"
    rule = Rule(
        causal=causal, scale=query.shape[-1] ** -0.5 if scale is None else scale, window=window,
        starts=mask[:, 0, 0] if mask is not None and mask.dtype == torch.int32 else None,
        seen=mask[:, 0, 0] != 0 if mask is not None and mask.dtype == torch.int8 else None,
    )  # fmt: skip
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(kind, enabled=False):
        return METHODS[context.method](query, key, value, group=context.group, rule=rule)
