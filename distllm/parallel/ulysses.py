"""Context parallelism by turning: all tokens of some heads in place of some tokens of all heads, for the attention alone.

Source: Jacobs et al. 2023 (DeepSpeed-Ulysses), arXiv 2309.14509.

Shapes: B batch, H query heads, K key heads, M tokens held, S = c M tokens of the sequence, D width of a head; c ranks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from distllm.parallel.blocks import Ranges, Rule, attend
from distllm.parallel.collectives import all_to_all


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
    turned = all_to_all(torch.cat(heads, 2).flatten(1, 2), group, split=1, concat=2)  # [B, heads, S, D]
    query, key, value = turned.split([tensor.shape[2] for tensor in heads], 1)
    whole = (range(turned.shape[2]),)
    out = attend(query, torch.stack((key, value))[None], mine=whole, theirs=[whole], rule=rule)
    return all_to_all(out, group, split=2, concat=1)
