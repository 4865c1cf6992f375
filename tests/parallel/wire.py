"""What a rank sends: each collective by kind, and the bytes that leave the rank by ring or direct algorithms."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch._dynamo  # a dispatch mode imports it when it begins: once here, not in every forked rank (2 s)
from torch.utils._python_dispatch import TorchDispatchMode


class Wire(TorchDispatchMode):
    """Counts calls and bytes sent in a group of `ranks`, by kind."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self._count(op.name().removeprefix("c10d::"), args)
        return op(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        others = self.ranks - 1
        first, second = (_bytes(arg) for arg in args[:2])
        sent = {
            "send": ("send", first), "recv_": ("recv", 0),
            "_allgather_base_": ("all_gather", second * others), "allgather_single_": ("all_gather", second * others),
            "_reduce_scatter_base_": ("reduce_scatter", second * others // self.ranks),
            "reduce_scatter_single_": ("reduce_scatter", second * others // self.ranks),
            "alltoall_base_": ("all_to_all", second * others // self.ranks),
        }  # fmt: skip
        kind, size = sent.get(name, (name, 0))
        self.calls[kind] += 1
        self.bytes[kind] += size


def _bytes(arg: Any) -> int:
    tensors = arg if isinstance(arg, list | tuple) else [arg]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
