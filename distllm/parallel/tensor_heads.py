"""Attention heads under tensor parallelism: which a rank has, and what its modules must be told.

H query heads, K heads of keys and values (grouped-query attention: K divides H), T ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads")
"""What attention modules call their number of query heads."""
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
HEAD_DIMS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_head")
WIDTHS = ("split_size", "inner_dim", "all_head_size")
"""Widths over all heads that families keep on the module: GPT-2, T5, BERT."""


@dataclass(frozen=True)
class Heads:
    """The heads of an attention module."""

    query: int
    key: int
    """Heads of keys and values."""
    dim: int | None
    """Numbers of one head; None: the module does not say."""

    def legal(self, size: int) -> bool:
        """Whether so many ranks can share the heads: whole query heads each, and whole key heads or one between several."""
        return self.query % size == 0 and (self.key % size == 0 or size % self.key == 0)

    def nearest(self, size: int) -> int:
        """The legal number of ranks that is nearest to `size`, the smaller of two."""
        return min((n for n in range(1, self.query + 1) if self.legal(n)), key=lambda n: (abs(n - size), n))

    def shared_key(self, size: int) -> bool:
        """Whether ranks share a key head: then all have every projection of keys and values, and use their own head."""
        return self.key % size != 0


def heads_of(module: nn.Module) -> Heads | None:
    """The heads of an attention module by its attributes, else by its `config`; None: it is no attention."""
    config = getattr(module, "config", None)
    dim = _first(module, HEAD_DIMS)
    query = _first(module, HEADS)
    if query is None and dim is not None:
        query = _first(config, HEADS)
    if query is None:
        return None
    key = _first(module, KEY_HEADS) or (_first(config, KEY_HEADS) if _first(config, HEADS) == query else None)
    return Heads(query, key or query, dim)


def keep_own_heads(module: nn.Module, heads: Heads, *, size: int) -> None:
    """Tell an attention module how many heads it now has, where it does not infer them from the shapes."""
    query, key = heads.query // size, max(heads.key // size, 1)
    for names, count in ((HEADS, query), (KEY_HEADS, key)):
        for name in names:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, count)
    for name in WIDTHS:
        if isinstance(width := getattr(module, name, None), int):
            assert width % size == 0
            setattr(module, name, width // size)
    if isinstance(getattr(module, "num_key_value_groups", None), int):
        module.num_key_value_groups = query // key  # type: ignore[assignment]


def own_key_head(heads: Heads, *, size: int, rank: int) -> int:
    """The key head that a rank's query heads look up, where ranks share key heads."""
    return rank * heads.key // size


def _first(holder: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
