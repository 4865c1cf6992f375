"""Tensor-parallel plans: those that transformers carries, and ours for families without one.

The styles are those of distllm/parallel/tensor_styles.py. Names are relative to the body, heads' are full.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_BERT = {
    **{f"encoder.layer.*.attention.self.{name}": "colwise" for name in ("query", "key", "value")},
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
_BART_ATTENTION = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "out_proj": "rowwise"}
_BART = {
    f"{stack}.layers.*.{attention}.{name}": style
    for stack, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn")))
    for attention in attentions
    for name, style in _BART_ATTENTION.items()
} | {
    f"{stack}.layers.*.{name}": style
    for stack in ("encoder", "decoder")
    for name, style in (("fc1", "colwise"), ("fc2", "rowwise"))
}  # fmt: skip
_T5_LAYER = {
    **{f"{attention}.{name}": "colwise" for attention in ("SelfAttention", "EncDecAttention") for name in "qkv"},
    "SelfAttention.o": "rowwise",
    "EncDecAttention.o": "rowwise",
    "SelfAttention.relative_attention_bias": "heads_embedding",
    **{f"DenseReluDense.{name}": "colwise" for name in ("wi", "wi_0", "wi_1")},
    "DenseReluDense.wo": "rowwise",
}

BODIES: dict[str, dict[str, str]] = {
    "gpt2": {
        "h.*.attn.c_attn": "qkv_colwise",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {
        **{f"transformer.layer.*.attention.{name}": "colwise" for name in ("q_lin", "k_lin", "v_lin")},
        "transformer.layer.*.attention.out_lin": "rowwise",
        "transformer.layer.*.ffn.lin1": "colwise",
        "transformer.layer.*.ffn.lin2": "rowwise",
    },
    "t5": {
        f"{stack}.block.*.layer.*.{name}": style for stack in ("encoder", "decoder") for name, style in _T5_LAYER.items()
    },
    "bart": _BART,
    "marian": _BART,
}
"""model_type -> plan of the body, without embeddings; patterns that a size leaves out (T5's gated layers) are dropped."""

def tp_plan(model: Any) -> dict[str, str]:
    """The tensor-parallel plan of a transformers model, by full module names; empty where nobody has one.

    To the plan of the body come the embedding, and the output projection where it makes tokens, cut along the vocabulary.

    Args:
        model: also on meta. What a plan names and the model has not is left out.
    """
    base = getattr(model.config, "base_model_tp_plan", None) or BODIES.get(model.config.model_type)
    if not base:
        return {}
    body = model.base_model_prefix
    prefix = f"{body}." if body and isinstance(getattr(model, body, None), nn.Module) else ""
    plan = {f"{prefix}{name}": style for name, style in base.items()} | dict(getattr(type(model), "_tp_plan", None) or {})
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = [n for n, m in model.named_modules(remove_duplicate=False) if _shares(m, embedding)]
    plan |= {name: "embedding_rowwise" for name in tied}
    if head is not None:
        plan[names[id(head)]] = "colwise_gather_output"
    every = [*dict(model.named_modules(remove_duplicate=False)), *dict(model.named_parameters(remove_duplicate=False))]
    present = {re.sub(r"\b\d+\b", "*", name) for name in every}
    return {name: style for name, style in plan.items() if name in present}


def _shares(module: nn.Module, embedding: nn.Module) -> bool:
    """Whether a module is an embedding with the weight of the token embedding."""
    return isinstance(module, nn.Embedding) and module.weight is embedding.weight
