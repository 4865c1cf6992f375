"""Context parallelism by moving keys and values: round a ring, or gathered at once. Queries stay where they are.

Each rank holds the tokens of two runs, one from the front and one from the back of the sequence, so that all have the same
work under a causal rule (zigzag: Brandon et al. 2023, arXiv 2311.09431, Llama 3, arXiv 2407.21783).

Shapes: B batch, H query heads, K key heads, M tokens held, D width of a head; c ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from distllm.parallel.blocks import Output, Ranges, Rule, Saved, attend, blocks, gradients
from distllm.parallel.collectives import gather_from
from distllm.parallel.kernels import wide


def zigzag(rank: int, *, ranks: int, seq_len: int) -> Ranges:
    """The runs of tokens of a rank: the sequence is cut in 2c, and rank r holds the parts r and 2c - 1 - r."""
    length, rest = divmod(seq_len, 2 * ranks)
    assert rest == 0, f"{seq_len} tokens cannot be cut in {2 * ranks}"
    return tuple(range(part * length, (part + 1) * length) for part in (rank, 2 * ranks - 1 - rank))


def ring_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, group: dist.ProcessGroup, rule: Rule
) -> torch.Tensor:
    """Attention with keys and values sent round the ring of `group`, each hop beside the computation on what is here.

    Sends c - 1 times [2, B, K, M, D] in the forward pass, and twice that in the backward pass: keys and values again,
    and their gradients home, in the dtype of the keys. Source: Liu et al. 2023, arXiv 2310.01889.

    Args:
        query: [B, H, M, D], the rank's own, as all are.
        key: [B, K, M, D].
        value: [B, K, M, D].
        group: the ranks that hold the sequence.
        rule: which keys a query may look at.

    Returns:
        [B, H, M, D].
    """
    return _Ring.apply(query, torch.stack((key, value)), group, rule)


def gathered_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, group: dist.ProcessGroup, rule: Rule
) -> torch.Tensor:
    """Attention with the keys and values of all ranks gathered, and their gradients scattered back: one collective each.

    Args and returns as `ring_attention`.
    """
    kv = gather_from(torch.stack((key, value))[None], group, dim=0)  # [c, 2, B, K, M, D]
    places = _places(group, query)
    return attend(query, kv, mine=places[dist.get_rank(group)], theirs=places, rule=rule)


def _places(group: dist.ProcessGroup, query: torch.Tensor) -> list[Ranges]:
    """Where the tokens of each rank stand."""
    ranks = dist.get_world_size(group)
    return [zigzag(rank, ranks=ranks, seq_len=ranks * query.shape[2]) for rank in range(ranks)]


@dataclass(frozen=True)
class _Hop:
    """A tensor under way to the next rank, and the one that comes from the rank before."""

    coming: torch.Tensor
    sent: torch.Tensor  # alive until it has left
    works: list[dist.Work]

    def arrive(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.coming


def _hop(tensor: torch.Tensor, group: dist.ProcessGroup) -> _Hop:
    """Start to send `tensor` to the next rank of the ring and to receive one like it from the rank before."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    coming = torch.empty_like(tensor)
    exchange = [
        dist.P2POp(dist.isend, tensor, peer=after, group=group),
        dist.P2POp(dist.irecv, coming, peer=before, group=group),
    ]
    return _Hop(coming, tensor, dist.batch_isend_irecv(exchange))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, kv, group, rule):  # type: ignore[no-untyped-def]
        places, rank = _places(group, query), dist.get_rank(group)
        output, here = Output(query), kv
        for step in range(len(places)):
            hop = _hop(here, group) if step + 1 < len(places) else None
            theirs = places[rank - step]
            output.look(here[0], here[1], blocks(places[rank], theirs, rule=rule), rule=rule)
            here = hop.arrive() if hop is not None else here
        out, lse = output.done()
        ctx.save_for_backward(query, kv, out, lse, *output.extra)
        ctx.rest = group, rule
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, kv, out, lse, *extra = ctx.saved_tensors
        group, rule = ctx.rest
        places, rank = _places(group, query), dist.get_rank(group)
        saved = Saved(query, out, lse, tuple(extra))
        dq = torch.zeros(query.shape, dtype=wide(query.dtype), device=query.device)
        own, here, homeward = None, kv, None
        for step in range(len(places)):
            hop = _hop(here, group) if step + 1 < len(places) else None
            parts = blocks(places[rank], places[rank - step], rule=rule)
            dkv = gradients(grad, saved, dq, (here[0], here[1]), parts, rule=rule)
            if own is None:
                own = dkv  # stays; the others' go on with their keys, one rank a step, and are home after the last
            else:
                if homeward is not None:
                    dkv += homeward.arrive()
                homeward = _hop(dkv.to(kv.dtype), group)
            here = hop.arrive() if hop is not None else here
        assert own is not None and homeward is not None
        own += homeward.arrive()
        return dq.to(query.dtype), own.to(kv.dtype), None, None
