"""Tiny models of every task, by model_type, and batches for them."""

from __future__ import annotations

from typing import Any

import torch

from distllm.config.schema import Config, DataConfig, ModelConfig, TaskConfig
from distllm.data.batch import IGNORE, Batch
from distllm.data.tokenizer import Roles
from distllm.models.build import resolve_spec
from distllm.models.spec import ModelSpec
from tests.models.families import FAMILIES

ENCODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 48,
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "xlm-roberta": ENCODER,
    "distilbert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dim": 64},
    "electra": ENCODER | {"embedding_size": 16},
    "albert": ENCODER | {"embedding_size": 16},
    "deberta-v2": ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "modernbert": ENCODER | {"local_attention": 8, "classifier_pooling": "mean"},
}
TRANSLATORS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4},
    "bart": SEQ2SEQ,
    "marian": SEQ2SEQ,
    "mbart": SEQ2SEQ,
}
DECODERS = ("gpt2", "llama", "qwen3")
ROLES = Roles(eos=0, pad=1, begin=2, separator=0, mask=3)
VOCABULARY = 120
LABELS = 3
CASES = [
    *((kind, task) for kind in ENCODERS for task in ("masked_lm", "classification")),
    *((kind, "seq2seq") for kind in TRANSLATORS),
    *((kind, "classification") for kind in DECODERS),
]
"""(model_type, task.kind)"""


def head_config(kind: str, task: str, *, seq_len: int = 16, model: dict[str, Any] | None = None, **sizes: Any) -> Config:
    known = {**ENCODERS, **TRANSLATORS, **{name: FAMILIES[name] for name in DECODERS}}
    section = {"type": kind, "sizes": known.get(kind, {}) | sizes} | (model or {})
    return Config(
        task=TaskConfig(kind=task),  # type: ignore[arg-type]
        model=ModelConfig(**section),
        data=DataConfig(seq_len=seq_len),
    )


def head_spec(
    kind: str, task: str, *, labels: int = LABELS, roles: Roles = ROLES, vocab_size: int = VOCABULARY, **more: Any
) -> ModelSpec:
    wanted = {"": labels} if task in ("classification", "regression") else {}
    return resolve_spec(head_config(kind, task, **more), vocab_size=vocab_size, labels=wanted, roles=roles)


def folder_spec(folder: Any, task: str, *, labels: int = LABELS, **model: Any) -> ModelSpec:
    """The spec of a model folder for a task."""
    section = ModelConfig(path=str(folder), **model)
    config = Config(task=TaskConfig(kind=task), model=section, data=DataConfig(seq_len=16))  # type: ignore[arg-type]
    wanted = {"": labels} if task in ("classification", "regression") else {}
    return resolve_spec(config, vocab_size=VOCABULARY, labels=wanted, roles=ROLES)


def rows(count: int, longest: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, S] of rows of different lengths, `<s> ... </s>` and padding, and their mask [B, S] int64."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (count, longest), generator=draw)
    lengths = torch.randint(longest // 2, longest + 1, (count,), generator=draw)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids[:, 0] = ROLES.begin
    ids[torch.arange(count), lengths - 1] = ROLES.eos
    return ids.masked_fill(mask == 0, ROLES.pad), mask


def batch_of(task: str, *, count: int = 8, seed: int = 0) -> Batch:
    """One batch of a task as the collators make them."""
    ids, mask = rows(count, 16, seed=seed)
    inputs = {"input_ids": ids, "attention_mask": mask}
    samples = tuple(range(count))
    if task == "classification":
        return Batch(inputs, {"labels": ids[:, 1] % LABELS}, samples)
    if task == "regression":
        return Batch(inputs, {"labels": ids[:, 1] / VOCABULARY, "weight": torch.ones(count)}, samples)
    if task == "seq2seq":
        target, target_mask = rows(count, 8, seed=seed + 1)
        labels = target[:, 1:].masked_fill(target_mask[:, 1:] == 0, IGNORE)
        inputs |= {"decoder_input_ids": target[:, :-1], "decoder_attention_mask": target_mask[:, 1:]}
        return Batch(inputs, {"labels": labels}, samples)
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.3) & (mask == 1)
    chosen[:, 1] = True
    inputs["input_ids"] = ids.masked_fill(chosen, ROLES.mask)
    return Batch(inputs, {"labels": ids.masked_fill(~chosen, IGNORE)}, samples)
