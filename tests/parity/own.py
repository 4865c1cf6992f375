"""A decoder of a user's own, with what every axis needs: named parts, a plan, an attention that can be replaced, positions."""

from __future__ import annotations

import torch
from torch import nn

from distllm.models.attention import Attention
from distllm.models.build import reset_parameters
from distllm.models.spec import ModelSpec


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.mix = Mix(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden)
        self.feed = Feed(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.feed(self.norm2(x))


class Mix(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, hidden // heads
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out: torch.Tensor = self.o(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Feed(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 3 * hidden), nn.Linear(3 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.tanh(self.up(x)))
        return out


class Decoder(nn.Module):
    def __init__(self, vocab_size: int, seq_len: int, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, hidden)
        self.place = nn.Embedding(seq_len, hidden)
        self.blocks = nn.ModuleList([Block(hidden, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab_size, bias=False)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.place(position_ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def spec(*, vocab_size: int, seq_len: int, hidden: int = 32, heads: int = 4, layers: int = 4) -> ModelSpec:
    def build() -> nn.Module:
        return Decoder(vocab_size, seq_len, hidden, heads, layers)

    plan = {f"blocks.*.mix.{name}": "colwise" for name in "qkv"} | {"blocks.*.mix.o": "rowwise"}
    plan |= {"blocks.*.feed.up": "colwise", "blocks.*.feed.down": "rowwise"}
    return ModelSpec(
        name="own", build=build, init=reset_parameters, blocks=("blocks",), embedding="embed", norm="norm", head="head",
        tp_plan=plan | {"embed": "embedding_rowwise", "head": "colwise_gather_output"}, vocab_size=vocab_size,
        max_seq_len=seq_len,
    )  # fmt: skip
