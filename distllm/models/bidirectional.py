"""Two recurrent nets over a right-padded batch, one from each side, with whole-sequence kernels and without packing.

Packed sequences need the lengths on the host, a sync in every step. Here each row is turned around inside its own
length, so that the backward net begins at the row's last token and padding comes last for both.
Shapes: B batch, S sequence, E input, H hidden of one direction.
"""

from __future__ import annotations

import torch
from torch import nn


class Bidirectional(nn.Module):
    """[B, S, E] -> [B, S, 2H]: what a net from the left and one from the right say at each token.

    Args:
        ahead: the net from the left, `batch_first`, one layer: nn.LSTM or nn.GRU.
        back: the net from the right, likewise.
    """

    def __init__(self, ahead: nn.RNNBase, back: nn.RNNBase) -> None:
        super().__init__()
        self.ahead = ahead
        self.back = back

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """Args:
        x: [B, S, E].
        turn: `turned(attention_mask)`, [B, S].

        Returns:
            [B, S, 2H]; what stands at padding means nothing.
        """
        # oneDNN has no LSTM for the mixture of formats that autocast makes on a CPU; a GPU's autocast is left alone.
        with torch.autocast("cpu", enabled=False):
            left, _ = self.ahead(x)
            right, _ = self.back(_permuted(x, turn))
        return torch.cat([left, _permuted(right, turn)], dim=-1)


def turned(mask: torch.Tensor) -> torch.Tensor:
    """For each place the place it comes from when every row is turned around inside its length; its own inverse.

    Args:
        mask: int64 [B, S]: 1 at tokens, then 0 at padding.

    Returns:
        int64 [B, S].
    """
    places = torch.arange(mask.shape[1], device=mask.device)
    return (mask.sum(1, keepdim=True) - 1 - places) % mask.shape[1]


def _permuted(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
