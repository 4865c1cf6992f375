"""Tiny configs of the families that tests build, by model_type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distllm.config.schema import Config, DataConfig, ModelConfig
from distllm.models.build import initial_tensors, resolve_spec
from distllm.models.spec import ModelSpec

BASE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = BASE | {"intermediate_size": 64, "num_key_value_heads": 2}
GLU = BASE | {"intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
    "mistral": LLAMA,
    "gemma2": LLAMA | {"head_dim": 8},
    "gemma3_text": LLAMA | {"head_dim": 8},
    "gpt2": BASE,
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4},
    "gpt_neox": GLU,
    "opt": BASE | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": GLU,
    "phi3": LLAMA,
    "olmo2": LLAMA,
    "falcon": BASE,
    "mixtral": LLAMA | {"num_local_experts": 4},
    "qwen3_moe": LLAMA | {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8},
}
VOCABULARY = 300


def config_of(kind: str, *, seq_len: int = 16, cross: bool = True, attention: Any = "auto", **sizes: Any) -> Config:
    model = ModelConfig(type=kind, sizes=FAMILIES[kind] | sizes, attention=attention)
    return Config(model=model, data=DataConfig(seq_len=seq_len, cross_documents=cross))


def spec_of(kind: str, *, seq_len: int = 16, attention: Any = "auto", **sizes: Any) -> ModelSpec:
    return resolve_spec(config_of(kind, seq_len=seq_len, attention=attention, **sizes), vocab_size=VOCABULARY)


def filled(spec: ModelSpec, *, seed: int = 1) -> nn.Module:
    """The spec's model with its initial tensors, in eval mode; buffers too, so that wrong ones are seen."""
    tensors = dict(initial_tensors(spec, seed=seed))
    model = spec.build().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(tensors[name])
    return model


def random_ids(rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
