"""Model FLOPs of one token's forward and backward pass, by formula.

Convention (PaLM, appendix B, https://arxiv.org/abs/2204.02311): a multiply-add is two FLOPs; the backward pass costs twice
the forward pass; what activation checkpointing computes again is not counted; attention is counted over the whole
sequence, although a causal kernel skips about half of it; a layer with a sliding window counts at most the window.
Only matrix products are counted: norms, biases, activations and the embedding look-up are not. PaLM's 6N counts the few
norm and bias parameters too, so N here is that of the matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
"""Encoders whose layers are plain attention and matrices; others share layers or have products of their own."""


def flops_per_token(config: Any, model: nn.Module, *, body: str | None = None) -> Callable[[int], float] | None:
    """Model FLOPs of one token (forward and backward) as a function of the sequence length.

    Args:
        config: the transformers config.
        model: the model, also on meta; its matrices are counted.
        body: for a model whose head sees one state a row: the path of what every token goes through. The head is left
            out, as it adds less than a token's share.

    Returns:
        The function of the sequence length, or None where a layer is not plain attention (state-space, linear attention)
        or tokens go different ways (an encoder-decoder).
    """
    windows = attention_windows(config)
    unknown = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and config.model_type not in ENCODERS
    if windows is None or config.is_encoder_decoder or unknown:
        return None
    matrices, heads, dims = matrix_parameters(config, model), config.num_attention_heads, head_dims(config)
    if body is not None:
        inner = model.get_submodule(body)
        pooler = getattr(inner, "pooler", None)
        matrices = matrix_parameters(config, inner) - (matrix_parameters(config, pooler) if pooler is not None else 0.0)

    def flops(seq_len: int) -> float:
        spans = sum(min(seq_len, window or seq_len) for window in windows)
        return 6.0 * matrices + 6.0 * heads * dims * spans

    return flops


def matrix_parameters(config: Any, model: nn.Module) -> float:
    """Parameters that a token is multiplied with: all matrices but embeddings, and of experts only the active share.

    Args:
        config: the transformers config, or None: then every matrix counts whole.
        model: the model, also on meta. A tied output projection counts once, as a product.
    """
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    active = _first(config, "num_experts_per_tok", "moe_top_k", "top_k")
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for weight in module._parameters.values():
            if weight is None or weight.dim() < 2:
                continue
            routed = weight.dim() == 3 and experts and weight.shape[0] == experts
            total += weight.numel() * (active / experts if routed and active and experts else 1.0)
    return total


def attention_windows(config: Any) -> list[int | None] | None:
    """For each layer how far its attention looks back (None: over the whole sequence); None if a layer is no attention."""
    layers = getattr(config, "num_hidden_layers", None)
    if layers is None or getattr(config, "num_attention_heads", None) is None:
        return None
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return [window] * layers
    if set(kinds) - {"full_attention", "sliding_attention"}:
        return None
    return [window if kind == "sliding_attention" else None for kind in kinds]


def head_dims(config: Any) -> int:
    """Widths of one head's query and value together; latent attention (DeepSeek) has two different ones."""
    nope, rope = getattr(config, "qk_nope_head_dim", None), getattr(config, "qk_rope_head_dim", None)
    if nope is not None and rope is not None:
        return int(nope + rope + config.v_head_dim)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(width)


def _first(config: Any, *names: str) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
