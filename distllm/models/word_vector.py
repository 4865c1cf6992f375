"""A classifier by the mean of word vectors and a few layers on it: the deep averaging network of Iyyer et al. 2015
(https://aclanthology.org/P15-1162): an example of an own module.

Set `model.spec: distllm.models.word_vector:spec`. Shapes: B batch, S sequence, E embedding, H hidden, C labels.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import nn

from distllm.models.build import reset_parameters
from distllm.models.spec import ModelSpec


class Vectors(nn.Embedding):
    """Word vectors that begin small, so that what a few thousand texts teach of them outweighs where they began."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)


class Hidden(nn.Module):
    """dropout(relu(W x + b))."""

    def __init__(self, inside: int, outside: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inside, outside)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.dropout(torch.relu(self.linear(x)))
        return y


class WordVector(nn.Module):
    """Logits [B, C] from the mean of the tokens' vectors."""

    def __init__(self, *, vocab_size: int, labels: int, embedding: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embed = Vectors(vocab_size, embedding)
        self.dropout = nn.Dropout(dropout)
        widths = [embedding, *[hidden] * layers]
        self.layers = nn.ModuleList(Hidden(a, b, dropout) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Args:
        input_ids: int64 [B, S].
        attention_mask: int64 [B, S], 1 at tokens and 0 at padding; None: all are tokens.
        """
        x = self.embed(input_ids)  # [B, S, E]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weight = mask.to(x.dtype)[:, :, None]
        x = self.dropout((x * weight).sum(1) / weight.sum(1))  # [B, E]
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


def spec(
    *, vocab_size: int, labels: int, embedding: int = 128, hidden: int = 128, layers: int = 1, dropout: float = 0.3
) -> ModelSpec:
    """The model's description; `vocab_size` and `labels` come from the data, the rest from `model.spec_args`."""
    build = partial(
        WordVector, vocab_size=vocab_size, labels=labels, embedding=embedding, hidden=hidden, layers=layers, dropout=dropout
    )
    return ModelSpec(
        name="word_vector", build=build, init=reset_parameters, blocks=("layers",), embedding="embed", head="head",
        vocab_size=vocab_size,
    )  # fmt: skip
