"""Attention as a module of its own, so that a model's sequences can be cut over ranks without a word in the model.

Shapes: B batch, H query heads, K key heads (H is a multiple of K), S sequence, D width of a head.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Scaled dot-product attention without parameters: `softmax(q k' / sqrt(D)) v`.

    A module of a user's own that holds one of these for each layer, and calls it for all that tokens learn of each other,
    runs under context parallelism: its forward there gets the tokens of one rank, with their `position_ids`.
    """

    def __init__(self, *, causal: bool = True) -> None:
        """Args: causal: whether a token looks at itself and those before it only."""
        super().__init__()
        self.is_causal = causal

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [B, H, S, D].
            key: [B, K, S, D].
            value: [B, K, S, D].
            attention_mask: the batch's `attention_mask` if it has one: bool [B, 1, S, S], True where a query (dim 2) may
                look at a key (dim 3), or [B, S], nonzero for keys that are no padding.

        Returns:
            [B, H, S, D].
        """
        mask = attention_mask
        if mask is not None and mask.dim() == 2:
            mask = mask.bool()[:, None, None]
            if self.is_causal:
                length = query.shape[2]
                mask = mask & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        causal = self.is_causal and mask is None
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
