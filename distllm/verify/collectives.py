"""What a rank sends: every collective of a step by group and kind, in calls and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.parallel.mesh import AXES, DATA_AXES, LOSS_AXES, SHARD_AXES, Mesh

EXPERT_SHARD_AXES = ("dp_shard", "cp")


@dataclass(frozen=True)
class Sent:
    """The collectives of one kind over one group."""

    calls: int
    bytes: Fraction
    """Sent by this rank, with ring or direct algorithms; a ring's share need not be whole."""

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.calls + other.calls, self.bytes + other.bytes)


Traffic = Mapping[tuple[str, str], Sent]
"""(group, kind) -> what was sent; groups as `group_name` calls them."""


def ring_bytes(kind: str, *, whole: int, ranks: int) -> Fraction:
    """What one rank sends in one collective.

    Args:
        kind: all_reduce, all_gather, reduce_scatter or broadcast.
        whole: bytes of the whole tensor: what is reduced, what is gathered, what is scattered.
        ranks: the size of the group.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    share = Fraction(whole * (ranks - 1), ranks)
    return 2 * share if kind == "all_reduce" else share


def group_name(axes: Sequence[str], sizes: Mapping[str, int]) -> str:
    """What the group over some axes is called: the axes that have more than one rank, as in `dp_shard+cp`."""
    return "+".join(axis for axis in axes if sizes[axis] > 1)


def group_names(mesh: Mesh) -> dict[str, str]:
    """torch's name of every process group of the mesh -> ours."""
    names: dict[str, str] = {}
    single: list[tuple[Sequence[str], dist.ProcessGroup | None]] = [((axis,), mesh.group(axis)) for axis in AXES]
    submeshes = ((SHARD_AXES, mesh.shards), (EXPERT_SHARD_AXES, mesh.expert_shards))
    several = [(axes, None if submesh is None else submesh.get_group()) for axes, submesh in submeshes]
    for axes, group in (*single, *several, (LOSS_AXES, mesh.loss_group), (DATA_AXES, mesh.data_group)):
        if group is not None:
            names.setdefault(group.group_name, group_name(axes, mesh.sizes))
    if dist.is_initialized():
        names.setdefault(dist.distributed_c10d._get_default_group().group_name, "world")
    return names


class Recorder(TorchDispatchMode):
    """Adds up what passes while it is entered: c10d's own operations, functional ones, and point-to-point sends."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._names = group_names(mesh)
        self.traffic: dict[tuple[str, str], Sent] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            for kind, group, size in _sent(op.__name__.partition(".")[0], args):
                if _size(group) == 1:  # FSDP beside tp has shard groups of one
                    continue
                key = (self._names.get(group, f"group {group}"), kind)
                self.traffic[key] = self.traffic.get(key, Sent(0, Fraction(0))) + Sent(1, size)
        return op(*args, **(kwargs or {}))


_WHOLE = {
    "allreduce_": ("all_reduce", 0), "allreduce_coalesced_": ("all_reduce", 0), "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0), "_allgather_base_": ("all_gather", 0), "allgather_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1), "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 0), "broadcast_": ("broadcast", 0), "broadcast": ("broadcast", 0),
}  # fmt: skip
"""Operation -> its kind, and which argument is the whole tensor."""


def _sent(name: str, args: Sequence[Any]) -> Iterator[tuple[str, str, Fraction]]:
    """(kind, torch's name of the group, bytes sent by this rank) of one operation; nothing for a receive or a wait."""
    if name == "send":
        yield "send", _group(args), Fraction(_bytes(args[0]))
        return
    if name in ("alltoall_base_", "all_to_all_single", "alltoall_"):
        yield "all_to_all", _group(args), Fraction(_to_others(name, args))
        return
    if name == "all_gather_into_tensor":  # the functional one is given this rank's part
        ranks = int(args[1])
        yield "all_gather", _group(args), ring_bytes("all_gather", whole=_bytes(args[0]) * ranks, ranks=ranks)
        return
    if name in _WHOLE:
        kind, at = _WHOLE[name]
        group = _group(args)
        yield kind, group, ring_bytes(kind, whole=_bytes(args[at]), ranks=_size(group))


def _to_others(name: str, args: Sequence[Any]) -> int:
    """Bytes of an all-to-all that leave this rank: all but its own split."""
    group = dist.distributed_c10d._resolve_process_group(_group(args))  # type: ignore[arg-type]
    mine, ranks = dist.get_rank(group), dist.get_world_size(group)
    if name == "alltoall_":
        return _bytes([tensor for other, tensor in enumerate(args[1]) if other != mine])
    source, splits = (args[1], args[4]) if name == "alltoall_base_" else (args[0], args[2])
    if not len(splits):
        return _bytes(source) * (ranks - 1) // ranks
    row = math.prod(source.shape[1:]) * source.element_size()
    return row * (sum(int(s) for s in splits) - int(splits[mine]))


def _group(args: Sequence[Any]) -> str:
    """torch's name of the process group among the arguments: boxed in c10d's operations, by name in functional ones."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return str(dist.ProcessGroup.unbox(value).group_name)
    return str(next(value for value in reversed(args) if isinstance(value, str)))


def _size(group: str) -> int:
    return dist.get_world_size(dist.distributed_c10d._resolve_process_group(group))  # type: ignore[arg-type]


def _bytes(value: Any) -> int:
    """Bytes of all tensors in a nest of lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, list | tuple) else 0
