"""A GRU encoder-decoder with attention (Cho et al. 2014, arXiv 1406.1078; Luong et al. 2015, arXiv 1508.04025): an example of
an own module that translates.

Attention looks from the decoder's outputs and does not feed back into its recurrence. So in training the decoder runs over
the whole target in one kernel, and all attention is one product. Set `model.spec: distllm.models.gru_seq2seq:spec`.
Shapes: B batch, S source, T target, E embedding, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from distllm.models.bidirectional import Bidirectional, turned
from distllm.models.build import reset_parameters
from distllm.models.spec import ModelSpec

Tensors = tuple[torch.Tensor, ...]


class SharedEmbedding(nn.Embedding):
    """One matrix for the source, the target and the output; its rows begin with a norm of about 1, as an output needs."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * math.sqrt(self.embedding_dim)


class DecoderLayer(nn.Module):
    """A GRU that is started from a given state: [B, T, E], [B, H] -> [B, T, H]."""

    def __init__(self, inside: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inside, hidden, batch_first=True)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor
        out, _ = self.gru(x, state[None].contiguous())
        return out


class Attention(nn.Module):
    """tanh(W [context; h]): each decoder output with the mean of the encoder's outputs that it looks at."""

    def __init__(self, *, hidden: int, encoded: int, outside: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden, encoded, bias=False)
        self.mix = nn.Linear(encoded + hidden, outside)

    def forward(self, h: torch.Tensor, encoded: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T, H], [B, S, 2H], bool [B, S] -> [B, T, E]."""
        scores = self.query(h) @ encoded.transpose(1, 2) / math.sqrt(encoded.shape[2])  # [B, T, S]
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return torch.tanh(self.mix(torch.cat([weights.to(h.dtype) @ encoded, h], dim=-1)))


class GRUSeq2Seq(nn.Module):
    """Logits [B, T, V] of each target token from the source and the target tokens before it."""

    def __init__(
        self, *, vocab_size: int, embedding: int, hidden: int, encoder_layers: int, decoder_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.embed = SharedEmbedding(vocab_size, embedding)
        self.dropout = nn.Dropout(dropout)
        inside = [embedding, *[2 * hidden] * encoder_layers]
        self.encoder = nn.ModuleList(
            Bidirectional(nn.GRU(e, hidden, batch_first=True), nn.GRU(e, hidden, batch_first=True)) for e in inside[:-1]
        )
        self.bridge = nn.Linear(2 * hidden, decoder_layers * hidden)
        self.decoder = nn.ModuleList(DecoderLayer(hidden if i else embedding, hidden) for i in range(decoder_layers))
        self.attention = Attention(hidden=hidden, encoded=2 * hidden, outside=embedding)
        self.head = nn.Linear(embedding, vocab_size, bias=False)
        self.head.weight = self.embed.weight

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        decoder_input_ids: torch.Tensor,
        decoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Args:
        input_ids: int64 [B, S], padded on the right.
        attention_mask: int64 [B, S], 1 at tokens and 0 at padding; None: all are tokens.
        decoder_input_ids: int64 [B, T]: the start token, then the target.
        decoder_attention_mask: not read: padding stands behind the target, where the decoder has not yet looked.
        """
        memory = self.encode(input_ids, attention_mask)
        logits, _ = self._decode(memory, self.first_state(memory), decoder_input_ids)
        return logits

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Tensors:
        """What decoding needs of the sources: outputs [B, S, 2H], mask bool [B, S], first states [B, layers * H]."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        turn, x = turned(mask), self.embed(input_ids)
        for layer in self.encoder:
            x = layer(self.dropout(x), turn)
        left, right = x.chunk(2, dim=-1)
        last = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, left.shape[2])
        ends = torch.cat([left.gather(1, last)[:, 0], right[:, 0]], dim=-1)  # each direction where it has seen all
        return self.dropout(x), mask.bool(), torch.tanh(self.bridge(ends))

    def first_state(self, memory: Tensors) -> Tensors:
        """The decoder's state before the first token: [B, H] for each layer."""
        return memory[2].chunk(len(self.decoder), dim=-1)

    def decode_step(self, memory: Tensors, state: Tensors, tokens: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """Take one more token of each row.

        Args:
            memory: what `encode` gave.
            state: what `first_state` or the step before gave.
            tokens: int64 [B].

        Returns:
            The logits [B, V] of the next token, and the state after this one.
        """
        logits, state = self._decode(memory, state, tokens[:, None])
        return logits[:, 0], state

    def _decode(self, memory: Tensors, state: Tensors, ids: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """Logits [B, T, V] after each of the ids [B, T], and the state after the last."""
        encoded, mask, _ = memory
        h, after = self.embed(ids), []
        for layer, before in zip(self.decoder, state, strict=True):
            h = layer(self.dropout(h), before)
            after.append(h[:, -1])
        return self.head(self.dropout(self.attention(h, encoded, mask))), tuple(after)


def spec(
    *, vocab_size: int, start_id: int, embedding: int = 256, hidden: int = 256, encoder_layers: int = 1,
    decoder_layers: int = 1, dropout: float = 0.3,
) -> ModelSpec:  # fmt: skip
    """The model's description; `vocab_size` and `start_id` come from the tokenizer, the rest from `model.spec_args`."""
    build = partial(
        GRUSeq2Seq, vocab_size=vocab_size, embedding=embedding, hidden=hidden, encoder_layers=encoder_layers,
        decoder_layers=decoder_layers, dropout=dropout,
    )  # fmt: skip
    return ModelSpec(
        name="gru_seq2seq", build=build, init=reset_parameters, blocks=("encoder", "decoder"), embedding="embed",
        head="head", vocab_size=vocab_size, decoder_start=start_id,
    )  # fmt: skip
