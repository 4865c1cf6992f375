"""A classifier by a bidirectional LSTM (Graves & Schmidhuber 2005) under max and mean pooling: an example of an own module.

Set `model.spec: distllm.models.lstm:spec`. Shapes: B batch, S sequence, E embedding, H hidden of one direction, C labels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from distllm.models.bidirectional import Bidirectional, turned
from distllm.models.build import reset_parameters
from distllm.models.spec import ModelSpec
from distllm.models.word_vector import Vectors


class OpenLSTM(nn.LSTM):
    """One layer whose forget gates begin open, at a bias of 1 (Jozefowicz et al. 2015)."""

    def __init__(self, inside: int, hidden: int) -> None:
        super().__init__(inside, hidden, batch_first=True)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            for name, value in (("bias_ih_l0", 1.0), ("bias_hh_l0", 0.0)):
                getattr(self, name)[self.hidden_size : 2 * self.hidden_size].fill_(value)


class LSTMClassifier(nn.Module):
    """Logits [B, C] from the greatest and the mean output of each unit over the tokens."""

    def __init__(self, *, vocab_size: int, labels: int, embedding: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embed = Vectors(vocab_size, embedding)
        self.dropout = nn.Dropout(dropout)
        widths = [embedding, *[2 * hidden] * layers]
        self.layers = nn.ModuleList(Bidirectional(OpenLSTM(w, hidden), OpenLSTM(w, hidden)) for w in widths[:-1])
        self.head = nn.Linear(4 * hidden, labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Args:
        input_ids: int64 [B, S], padded on the right.
        attention_mask: int64 [B, S], 1 at tokens and 0 at padding; None: all are tokens.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        turn, x = turned(mask), self.embed(input_ids)
        for layer in self.layers:
            x = layer(self.dropout(x), turn)  # [B, S, 2H]
        tokens = mask.bool()[:, :, None]
        greatest = x.masked_fill(~tokens, -torch.inf).amax(1)
        mean = x.masked_fill(~tokens, 0.0).sum(1) / tokens.sum(1)
        logits: torch.Tensor = self.head(self.dropout(torch.cat([greatest, mean], dim=-1).to(x.dtype)))
        return logits


def spec(
    *, vocab_size: int, labels: int, embedding: int = 128, hidden: int = 64, layers: int = 1, dropout: float = 0.5
) -> ModelSpec:
    """The model's description; `vocab_size` and `labels` come from the data, the rest from `model.spec_args`."""
    build = partial(
        LSTMClassifier, vocab_size=vocab_size, labels=labels, embedding=embedding, hidden=hidden, layers=layers,
        dropout=dropout,
    )  # fmt: skip
    return ModelSpec(
        name="lstm", build=build, init=reset_parameters, blocks=("layers",), embedding="embed", head="head",
        vocab_size=vocab_size,
    )  # fmt: skip
