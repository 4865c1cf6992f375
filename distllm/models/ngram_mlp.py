"""A neural n-gram language model (Bengio et al. 2003, https://jmlr.org/papers/v3/bengio03a.html): an example of an own module.

Each token is predicted from the embeddings of the last `context` tokens, through residual blocks. Set
`model.spec: distllm.models.ngram_mlp:spec`. Shapes: B batch, S sequence, E embedding, H hidden, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from distllm.models.build import reset_parameters
from distllm.models.spec import ModelSpec


class Block(nn.Module):
    """x + W2 tanh(W1 norm(x)) on [B, S, H]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 2 * hidden)
        self.down = nn.Linear(2 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class NgramMLP(nn.Module):
    """Logits [B, S, V] of the next token from the last `context` tokens; before the text begins there are zeros."""

    def __init__(self, *, vocab_size: int, context: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(vocab_size, embedding)
        self.mix = nn.Linear(context * embedding, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab_size, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        steps = input_ids.shape[1]
        embedded = F.pad(self.embed(input_ids), (0, 0, self.context - 1, 0))  # [B, context-1+S, E]
        windows = [embedded[:, i : i + steps] for i in range(self.context)]
        x = self.mix(torch.cat(windows, dim=-1))  # [B, S, H]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def spec(
    *, vocab_size: int, context: int = 8, embedding: int = 64, hidden: int = 128, layers: int = 2
) -> ModelSpec:
    """The model's description; `vocab_size` comes from the tokenizer, the rest from `model.spec_args`."""
    products = context * embedding * hidden + layers * 4 * hidden * hidden + hidden * vocab_size
    return ModelSpec(
        name="ngram_mlp",
        build=partial(
            NgramMLP, vocab_size=vocab_size, context=context, embedding=embedding, hidden=hidden, layers=layers
        ),
        init=reset_parameters,
        blocks=("blocks",),
        embedding="embed",
        norm="norm",
        head="head",
        vocab_size=vocab_size,
        flops_per_token=lambda seq_len: 6.0 * products,
    )
