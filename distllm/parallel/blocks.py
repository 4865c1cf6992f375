"""Attention of some queries of a sequence over some of its keys, in blocks whose outputs and gradients add up.

A rank of context parallelism holds one or two runs of consecutive tokens. Which keys a query may look at follows from
where both stand in the sequence, so no mask over the whole sequence is ever made: where the rule is plain (all keys, or
those not after the query) the kernel knows it, and where documents, padding or a window cut it, small tiles are masked.

Shapes: B batch, S tokens of the whole sequence, H query heads, K key heads, M and N queries and keys held, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from distllm.parallel.kernels import additive, choose_kernel, wide

Ranges = tuple[range, ...]
"""The tokens that someone holds, in order, as runs of places in the sequence."""
TILE = 2048
"""Queries and keys of a masked tile: its mask is 16 MiB a row in fp32, and its products still fill a GPU."""


@dataclass(frozen=True)
class Rule:
    """Which keys a query may look at."""

    causal: bool
    scale: float
    """What the products of queries and keys are multiplied by."""
    window: int | None = None
    """A causal query looks at itself and this many keys less one before it; None: at all."""
    starts: torch.Tensor | None = None
    """Where each token's document begins, int [B, S]: a query looks at no key before it."""
    seen: torch.Tensor | None = None
    """Which keys are looked at at all, bool [B, S]; the others are padding."""

    @property
    def plain(self) -> bool:
        """Whether kernels can do without a mask."""
        return self.window is None and self.starts is None and self.seen is None

    def visible(self, queries: range, keys: range, *, device: torch.device) -> torch.Tensor:
        """For places of the sequence, bool [B or 1, 1, queries, keys]: True where a query may look at a key."""
        query = torch.arange(queries.start, queries.stop, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)
        mask = torch.ones(1, 1, len(queries), len(keys), dtype=torch.bool, device=device)
        if self.causal:
            mask = mask & (key <= query)
        if self.window is not None:
            mask = mask & (key > query - self.window)
        if self.starts is not None:
            mask = mask & (key >= self.starts[:, None, queries.start : queries.stop, None])
        if self.seen is not None:
            mask = mask & self.seen[:, None, None, keys.start : keys.stop]
        return mask


@dataclass(frozen=True)
class Block:
    """A product of some held queries with some held keys."""

    queries: slice
    keys: slice
    causal: bool
    """Whether the i-th query looks at no key after the i-th; then there are as many keys as queries."""
    mask: tuple[range, range] | None
    """The places that `Rule.visible` is asked for; None: no mask."""


def blocks(mine: Ranges, theirs: Ranges, *, rule: Rule) -> Iterator[Block]:
    """What the holder of `mine` computes over the keys of `theirs`, in the fewest kernels.

    Args:
        mine: where the queries stand.
        theirs: where the keys stand; the same runs as `mine` or runs apart from them.
    """
    if not rule.plain:
        yield from _tiles(mine, theirs, rule=rule)
    elif not rule.causal:
        yield Block(_held(mine, 0, len(mine)), _held(theirs, 0, len(theirs)), False, None)
    elif mine == theirs:  # both ascend, so the i-th query sees the keys up to the i-th
        yield Block(_held(mine, 0, len(mine)), _held(theirs, 0, len(theirs)), True, None)
    else:
        # How many of their runs each of my runs sees: the same for runs side by side, which then go together.
        sees = [sum(other.start < run.start for other in theirs) for run in mine]
        first = 0
        for last in range(1, len(mine) + 1):
            if last == len(mine) or sees[last] != sees[first]:
                if sees[first]:
                    yield Block(_held(mine, first, last), _held(theirs, 0, sees[first]), False, None)
                first = last


def area(block: Block) -> float:
    """How many products of a query and a key a block needs, in units of one; half of a causal block."""
    whole = (block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start)
    return whole / 2 if block.causal else float(whole)


def _held(runs: Ranges, first: int, last: int) -> slice:
    """Where the runs [first, last) lie among the tokens held."""
    begin = sum(map(len, runs[:first]))
    return slice(begin, begin + sum(map(len, runs[first:last])))


def _tiles(mine: Ranges, theirs: Ranges, *, rule: Rule) -> Iterator[Block]:
    """Masked blocks of at most TILE x TILE, without those that no query sees by its place alone."""
    for (queries, at_query), (keys, at_key) in product(list(_cut(mine)), list(_cut(theirs))):
        if rule.causal and keys.start >= queries.stop:
            continue
        if rule.window is not None and keys.stop - 1 <= queries.start - rule.window:
            continue
        held = slice(at_query, at_query + len(queries)), slice(at_key, at_key + len(keys))
        yield Block(*held, False, (queries, keys))


def _cut(runs: Ranges) -> Iterator[tuple[range, int]]:
    """Pieces of runs, each with where it lies among the tokens held."""
    held = 0
    for run in runs:
        for begin in range(0, len(run), TILE):
            yield run[begin : begin + TILE], held + begin
        held += len(run)


class Output:
    """The output of some queries, growing with the keys that they have looked at."""

    def __init__(self, query: torch.Tensor) -> None:
        """Args: query: [B, H, M, D]."""
        self._query = query
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None
        self.extra: tuple[torch.Tensor, ...] = ()

    def look(self, key: torch.Tensor, value: torch.Tensor, parts: Iterator[Block], *, rule: Rule) -> None:
        """Add what the queries see in keys and values [B, K, N, D]."""
        for block in parts:
            query = self._query[:, :, block.queries]
            mask = _mask(block, rule, like=query)
            kernel = choose_kernel(query, masked=mask is not None)
            out, lse, extra = kernel.forward(
                query, key[:, :, block.keys], value[:, :, block.keys], causal=block.causal, mask=mask, scale=rule.scale
            )
            self.extra = extra or self.extra
            self._merge(block.queries, out, lse)

    def _merge(self, at: slice, out: torch.Tensor, lse: torch.Tensor) -> None:
        if self._out is None and out.shape == self._query.shape:
            self._out, self._lse = out, lse  # most often the only one
            return
        if self._out is None:
            self._out, self._lse = torch.zeros_like(self._query), lse.new_full(self._query.shape[:3], -torch.inf)
        assert self._lse is not None
        self._out = self._out.to(lse.dtype)
        before = self._lse[:, :, at]
        both = torch.logaddexp(before, lse)
        floor = torch.where(both == -torch.inf, 0.0, both)  # queries that have seen nothing yet: 0 and not 0 / 0
        kept, added = torch.exp(before - floor)[..., None], torch.exp(lse - floor)[..., None]
        self._out[:, :, at] = self._out[:, :, at] * kept + out * added
        self._lse[:, :, at] = both

    def done(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [B, H, M, D] in the queries' dtype; the lse [B, H, M], inf for queries that saw nothing."""
        assert self._out is not None and self._lse is not None
        return self._out.to(self._query.dtype), torch.where(self._lse == -torch.inf, torch.inf, self._lse)


@dataclass(frozen=True)
class Saved:
    """What the forward pass leaves for the backward pass."""

    query: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    extra: tuple[torch.Tensor, ...]


def gradients(
    grad: torch.Tensor, saved: Saved, dq: torch.Tensor, keys: tuple[torch.Tensor, torch.Tensor], parts: Iterator[Block],
    *, rule: Rule,
) -> torch.Tensor:  # fmt: skip
    """Add the gradient of the queries that comes through some keys, and return that of these keys.

    Args:
        grad: of the output, [B, H, M, D].
        dq: [B, H, M, D] in `wide` of its dtype; added to.
        keys: keys and values, each [B, K, N, D].
        parts: what the forward pass computed over them.

    Returns:
        The gradients of keys and values, [2, B, K, N, D], in `wide` of their dtype.
    """
    key, value = keys
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()  # that of a sum is one number spread out
    dkv = torch.zeros(2, *key.shape, dtype=wide(key.dtype), device=key.device)
    for block in parts:
        q, k = block.queries, block.keys
        query = saved.query[:, :, q]
        mask = _mask(block, rule, like=query)
        part = choose_kernel(query, masked=mask is not None).backward(
            grad[:, :, q], query, key[:, :, k], value[:, :, k], saved.out[:, :, q], saved.lse[:, :, q],
            causal=block.causal, mask=mask, scale=rule.scale, extra=saved.extra,
        )  # fmt: skip
        dq[:, :, q] += part[0]
        dkv[0, :, :, k] += part[1]
        dkv[1, :, :, k] += part[2]
    return dkv


def _mask(block: Block, rule: Rule, *, like: torch.Tensor) -> torch.Tensor | None:
    if block.mask is None:
        return None
    return additive(rule.visible(*block.mask, device=like.device), dtype=like.dtype)


class _Attend(torch.autograd.Function):
    """Attention over keys that are all here."""

    @staticmethod
    def forward(ctx, query, kv, mine, theirs, rule):  # type: ignore[no-untyped-def]
        output = Output(query)
        for part, runs in zip(kv, theirs, strict=True):
            output.look(part[0], part[1], blocks(mine, runs, rule=rule), rule=rule)
        out, lse = output.done()
        ctx.save_for_backward(query, kv, out, lse, *output.extra)
        ctx.rest = mine, theirs, rule
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, kv, out, lse, *extra = ctx.saved_tensors
        mine, theirs, rule = ctx.rest
        saved = Saved(query, out, lse, tuple(extra))
        dq = torch.zeros(query.shape, dtype=wide(query.dtype), device=query.device)
        dkv = torch.empty_like(kv)
        for part, runs, place in zip(kv, theirs, dkv, strict=True):
            place.copy_(gradients(grad, saved, dq, (part[0], part[1]), blocks(mine, runs, rule=rule), rule=rule))
        return dq.to(query.dtype), dkv, None, None, None


def attend(
    query: torch.Tensor, kv: torch.Tensor, *, mine: Ranges, theirs: Sequence[Ranges], rule: Rule
) -> torch.Tensor:
    """Attention over keys that are all here.

    Args:
        query: [B, H, M, D].
        kv: keys and values of each holder, [holders, 2, B, K, N, D].
        mine: where the queries stand.
        theirs: where each holder's keys stand.
        rule: which keys a query may look at.

    Returns:
        [B, H, M, D].
    """
    return _Attend.apply(query, kv, mine, tuple(theirs), rule)
