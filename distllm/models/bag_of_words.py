"""A multi-layer perceptron over bags of words: an example of an own module.

The first layer multiplies a vector of V counts by a matrix. That is the sum of the matrix's rows at the tokens, so no
vector of counts is made. Set `model.spec: distllm.models.bag_of_words:spec`.
Shapes: B batch, S sequence, H hidden, V vocabulary, C labels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from distllm.models.build import reset_parameters
from distllm.models.spec import ModelSpec


class Counts(nn.Module):
    """W counts + b for the counts [B, V] of a batch of texts, without making them; W [H, V] is `rows`, transposed."""

    def __init__(self, vocab_size: int, hidden: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(vocab_size, hidden)
        self.bias = nn.Parameter(torch.empty(hidden))

    def reset_parameters(self) -> None:
        # Most texts have tens of words: rows of unit variance, as an embedding's own, would saturate the next layer.
        nn.init.normal_(self.rows.weight, std=0.1)
        nn.init.zeros_(self.bias)

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.rows(input_ids)  # [B, S, H]
        return (rows * mask.to(rows.dtype)[:, :, None]).sum(1) + self.bias


class Hidden(nn.Module):
    """W dropout(relu(x)) + b on [B, H]."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(self.dropout(torch.relu(x)))
        return y


class BagOfWords(nn.Module):
    """Logits [B, C] from how often each token is in the text."""

    def __init__(self, *, vocab_size: int, labels: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.counts = Counts(vocab_size, hidden)
        self.layers = nn.ModuleList(Hidden(hidden, dropout) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Args:
        input_ids: int64 [B, S].
        attention_mask: int64 [B, S], 1 at tokens and 0 at padding; None: all are tokens.
        """
        x = self.counts(input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.dropout(torch.relu(x)))
        return logits


def spec(*, vocab_size: int, labels: int, hidden: int = 128, layers: int = 1, dropout: float = 0.5) -> ModelSpec:
    """The model's description; `vocab_size` and `labels` come from the data, the rest from `model.spec_args`."""
    return ModelSpec(
        name="bag_of_words",
        build=partial(BagOfWords, vocab_size=vocab_size, labels=labels, hidden=hidden, layers=layers, dropout=dropout),
        init=reset_parameters,
        blocks=("layers",),
        embedding="counts.rows",
        head="head",
        vocab_size=vocab_size,
    )
