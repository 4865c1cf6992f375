"""Model FLOPs of a token under four conventions, so that an MFU can be set beside anybody's.

A multiply-add is two FLOPs, the backward pass costs twice the forward pass, and attention counts the whole sequence although a
causal kernel skips half of it. They differ in which parameters count:

- palm: 6 N + 12 L H Q T, N without the input embedding (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
- nanogpt: the same with the input embedding in N (nanoGPT, `estimate_mfu`).
- torchtitan: 6 (N - N_emb) + 6 L H (d_qk + d_v) s (torchtitan, `get_nparams_and_flops`). Of a tied model that leaves the output
  projection out too.
- narayanan: 72 l h^2 (1 + s / 6h + V / 12 l h) (Narayanan et al. 2021, arXiv 2104.04473): a GPT whose feed-forward is 4 h wide,
  whatever the model is.

L, l layers, H heads, Q head width, T, s sequence length, h hidden width, V vocabulary, d_qk and d_v widths of a head's query
and value. 2 Q = d_qk + d_v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distllm.models.build import meta_model
from distllm.models.flops import attention_windows, head_dims, matrix_parameters
from distllm.models.spec import ModelSpec

CONVENTIONS = ("palm", "nanogpt", "torchtitan", "narayanan")


@dataclass(frozen=True)
class Shape:
    """What the formulas read of a model."""

    parameters: int
    """All, a tied one once; of experts only those that a token sees."""
    embedding: int
    """Parameters of the input embedding."""
    tied: bool
    """Whether the input embedding is the output projection too."""
    layers: int
    heads: int
    head_dims: int
    """d_qk + d_v."""
    hidden: int
    vocab: int


def palm(shape: Shape, seq_len: int) -> float:
    """FLOPs of a token with N without the input embedding; a tied one stays, as the output projection."""
    n = shape.parameters - (0 if shape.tied else shape.embedding)
    return 6.0 * n + 6.0 * shape.layers * shape.heads * shape.head_dims * seq_len


def nanogpt(shape: Shape, seq_len: int) -> float:
    """FLOPs of a token with N with the embedding."""
    return 6.0 * shape.parameters + 6.0 * shape.layers * shape.heads * shape.head_dims * seq_len


def torchtitan(shape: Shape, seq_len: int) -> float:
    """FLOPs of a token without any embedding, also where it is tied."""
    n = shape.parameters - shape.embedding
    return 6.0 * n + 6.0 * shape.layers * shape.heads * shape.head_dims * seq_len


def narayanan(shape: Shape, seq_len: int) -> float:
    """FLOPs of a token of a GPT of this width and depth."""
    layers, hidden = shape.layers, shape.hidden
    return 72.0 * layers * hidden**2 * (1.0 + seq_len / (6.0 * hidden) + shape.vocab / (12.0 * layers * hidden))


def conventions(shape: Shape, seq_len: int) -> dict[str, float]:
    """Convention -> FLOPs of a token."""
    formulas = (palm, nanogpt, torchtitan, narayanan)
    return {formula.__name__: formula(shape, seq_len) for formula in formulas}


def hardware_factor(mode: str) -> float | None:
    """FLOPs that are computed over FLOPs of the model: 4/3 where every block's forward pass runs twice; None: between."""
    return {"none": 1.0, "full": 4.0 / 3.0}.get(mode)


def shape_of(spec: ModelSpec) -> Shape | None:
    """The shape of a model; None where tokens do not all go through plain attention, and no formula holds."""
    config: Any = spec.hf_config
    if config is None or spec.flops_per_token is None or attention_windows(config) is None:
        return None
    model = meta_model(spec)
    table = getattr(model.get_submodule(spec.embedding), "weight", None) if spec.embedding else None
    head = getattr(model.get_submodule(spec.head), "weight", None) if spec.head else None
    idle = matrix_parameters(None, model) - matrix_parameters(config, model)
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()) - round(idle),
        embedding=table.numel() if table is not None else 0,
        tied=table is not None and head is table,
        layers=config.num_hidden_layers, heads=config.num_attention_heads, head_dims=head_dims(config),
        hidden=config.hidden_size, vocab=config.vocab_size,
    )  # fmt: skip
