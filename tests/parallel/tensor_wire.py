"""What a rank sends, by kind of collective."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo  # a dispatch mode imports it when it begins: once here, not in every forked rank (2 s)
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {"allreduce": "all_reduce", "allgather": "all_gather", "reduce_scatter": "reduce_scatter", "alltoall": "all_to_all"}


class Wire(TorchDispatchMode):
    """Records each collective: its kind and the elements that the rank puts in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            kind = next((kind for part, kind in KINDS.items() if part in str(op)), str(op))
            inputs = args[0] if kind == "all_reduce" else args[1]
            tensors = inputs if isinstance(inputs, list | tuple) else [inputs]
            self.calls.append((kind, sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))))
        return op(*args, **(kwargs or {}))

    def count(self, kind: str, elements: int) -> int:
        """How many collectives of a kind put in so many elements."""
        return self.calls.count((kind, elements))


def elements_sent(kind: str, elements: int, ranks: int) -> float:
    """What a ring sends of a collective, in elements."""
    factor = {"all_reduce": 2 * (ranks - 1) / ranks, "reduce_scatter": (ranks - 1) / ranks, "all_gather": ranks - 1}
    return factor[kind] * elements
