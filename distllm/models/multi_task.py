"""A transformers encoder with a head for each of several tasks.

Shapes: B batch, T rows of one task, S sequence, D hidden, E embedding, C outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distllm.config.errors import ConfigError
from distllm.config.schema import HeadConfig
from distllm.models.spec import ModelSpec

DROPOUTS = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout")
"""Where families keep the dropout before a head; the first that is set."""


class MultiTaskOutput(NamedTuple):
    """A tuple, so that every parallelism finds the tensors in it."""

    logits: dict[str, torch.Tensor]
    """For each task the logits of its rows: [T, C], [T, 1] for a number, or [T, S, V] for tokens."""


class RowHead(nn.Module):
    """[T, S, D] -> [T, C] from the first token's state."""

    def __init__(self, hidden: int, outputs: int, *, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, outputs)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.dropout(states[:, 0]))
        return logits


class TokenHead(nn.Module):
    """[T, S, D] -> [T, S, V], as BERT's: a dense layer, a norm, and the embedding as the output projection."""

    def __init__(self, hidden: int, embedding: nn.Embedding, *, eps: float) -> None:
        super().__init__()
        width = embedding.embedding_dim
        self.dense = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.output = nn.Linear(width, embedding.num_embeddings)
        self.output.weight = embedding.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(F.gelu(self.dense(states)))
        logits: torch.Tensor = self.output(hidden)
        # Linear with a bias returns a view, of which FSDP warns: what is done to it in place would escape its hooks.
        return logits.clone() if logits._is_view() else logits


class MultiTask(nn.Module):
    """A body, under the name that its family gives it inside of larger models, and heads."""

    def __init__(self, body: Any, *, tasks: Mapping[str, HeadConfig], outputs: Mapping[str, int]) -> None:
        super().__init__()
        self.config = body.config
        self.base_model_prefix = str(body.base_model_prefix)
        self.add_module(self.base_model_prefix, body)
        dropout = next((p for p in (getattr(body.config, n, None) for n in DROPOUTS) if p is not None), 0.0)
        hidden, eps = int(body.config.hidden_size), float(getattr(body.config, "layer_norm_eps", 1e-12))
        self.heads = nn.ModuleDict()
        for name, task in tasks.items():
            head = TokenHead(hidden, body.get_input_embeddings(), eps=eps) if task.kind == "masked_lm" else (
                RowHead(hidden, outputs[name], dropout=float(dropout))
            )  # fmt: skip
            self.heads[_key(name)] = head
        self.tasks = tuple(tasks)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None, **rows: torch.Tensor,
    ) -> MultiTaskOutput:  # fmt: skip
        """The logits of each task's rows.

        Args:
            input_ids: [B, S].
            attention_mask: int64 [B, S].
            token_type_ids: int64 [B, S], for bodies that take them.
            rows: for each task `rows_NAME` int64 [T], its rows of the batch. With none its head still takes part, so that
                its parameters have a gradient, of zeros, on every rank.
        """
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        body = self.get_submodule(self.base_model_prefix)
        states = body(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state  # [B, S, D]
        return MultiTaskOutput({name: self.heads[_key(name)](states[rows[f"rows_{name}"]]) for name in self.tasks})


def multi_task_spec(body: ModelSpec, *, tasks: Mapping[str, HeadConfig], outputs: Mapping[str, int]) -> ModelSpec:
    """Describe a body with a head for each task.

    Its tensors have the names of a transformers model with that body (`bert.encoder...`), and `heads.NAME_head...`: weights
    of any such model are its body's, and transformers loads the body of what is exported.

    Args:
        body: the body alone, without pooler, as `hf_spec` makes it for task.kind=multi_task.
        tasks: the tasks by name.
        outputs: for each task that classifies, its classes; 1 for regression.

    Raises:
        ConfigError: a body that is no encoder, or a name that cannot be part of a tensor's.
    """
    config = body.hf_config
    problems = [
        f"task.tasks.{name}: a task's name has letters, digits and underscores alone; nearest: {_nearest(name)}"
        for name in tasks
        if not name.isidentifier()
    ]
    if config.is_encoder_decoder or body.name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        problems.append(f"model: {body.name} is no encoder, whose first token could stand for a text; use model.type=bert")
    if problems:
        raise ConfigError(problems)

    def build() -> nn.Module:
        return MultiTask(body.build(), tasks=tasks, outputs=outputs)

    with torch.device("meta"):
        prefix = str(build().base_model_prefix)
    plan = {f"{prefix}.{name.removeprefix(f'{prefix}.')}": style for name, style in body.tp_plan.items()}
    if plan:  # the output projections of heads for tokens are tied to the embedding, which is cut
        plan |= {f"heads.{_key(n)}.output": "colwise_gather_output" for n, t in tasks.items() if t.kind == "masked_lm"}
    return replace(
        body, build=build, base=prefix, head=None, embedding=f"{prefix}.{body.embedding}",
        norm=None if body.norm is None else f"{prefix}.{body.norm}",
        blocks=tuple(f"{prefix}.{path}" for path in body.blocks),
        tp_plan=plan,
    )  # fmt: skip


def _key(name: str) -> str:
    """A head's name: not the task's own, which could be that of a method."""
    return f"{name}_head"


def _nearest(name: str) -> str:
    plain = "".join(c if c.isalnum() else "_" for c in name)
    return plain if plain.isidentifier() else f"task_{plain}"
