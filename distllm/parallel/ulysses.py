"""Context parallelism by turning: all tokens of some heads in place of some tokens of all heads, for the attention alone.

Source: Jacobs et al. 2023 (DeepSpeed-Ulysses), arXiv 2309.14509.

Shapes: B batch, H query heads, K key heads, M tokens held, S = c M tokens of the sequence, D width of a head; c ranks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from distllm.parallel.blocks import Ranges, Rule, attend


def straight(rank: int, *, ranks: int, seq_len: int) -> Ranges:
    """The run of tokens of a rank: the r-th of c. Work is even, because each rank has heads and not tokens."""
    length, rest = divmod(seq_len, ranks)
    assert rest == 0, f"{seq_len} tokens cannot be cut in {ranks}"
    return (range(rank * length, (rank + 1) * length),)


def ulysses_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, group: dist.ProcessGroup, rule: Rule
) -> torch.Tensor:
    """Attention of H / c heads over the whole sequence, between two all-to-alls; as many in the backward pass.

    Key heads that c does not divide are repeated until it does; otherwise they travel as they are.

    Args:
        query: [B, H, M, D], H a multiple of c; the rank's own tokens, as all are.
        key: [B, K, M, D].
        value: [B, K, M, D].
        group: the ranks that hold the sequence.
        rule: which keys a query may look at.

    Returns:
        [B, H, M, D].
    """
    ranks = dist.get_world_size(group)
    assert query.shape[1] % ranks == 0, f"{query.shape[1]} heads cannot be spread over {ranks} ranks"
    times = ranks // math.gcd(key.shape[1], ranks)
    if times > 1:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    # One all-to-all for the three: what goes to a rank is its query heads, then its key heads, then its value heads.
    heads = [tensor.unflatten(1, (ranks, -1)) for tensor in (query, key, value)]
    turned = _to_heads(torch.cat(heads, 2), group)
    query, key, value = turned.split([tensor.shape[2] for tensor in heads], 1)
    whole = (range(turned.shape[2]),)
    out = attend(query, torch.stack((key, value))[None], mine=whole, theirs=[whole], rule=rule)
    return _to_tokens(out, group)


def _to_heads(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[B, c, h, M, D], heads by the rank that shall have them -> [B, h, S, D]."""
    arrived = _AllToAll.apply(tensor.transpose(0, 1), group)  # [c, B, h, M, D] by the rank that had the tokens
    return arrived.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _to_tokens(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[B, h, S, D] -> [B, c h, M, D]."""
    by_rank = tensor.unflatten(2, (dist.get_world_size(group), -1)).permute(2, 0, 1, 3, 4)
    arrived = _AllToAll.apply(by_rank, group)  # [c, B, h, M, D] by the rank that had the heads
    return arrived.transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Row i of the first dim goes to rank i, and comes from it; gradients go back the same way."""

    @staticmethod
    def forward(ctx, tensor, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return _exchanged(tensor, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _exchanged(grad, ctx.group), None


def _exchanged(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    tensor = tensor.contiguous()
    arrived = torch.empty_like(tensor)
    dist.all_to_all_single(arrived, tensor, group=group)
    return arrived
