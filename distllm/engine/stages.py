"""Whole tensors, gathered from shards and brought from pipeline stages to the first rank."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from distllm.comm import gather_over

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
_DIMS = 6


def owners_in_order(names: Iterable[str], group: dist.ProcessGroup | None) -> Iterator[tuple[str, int]]:
    """The names of all stages in the order of the pp axis, each with the place of the rank that has it; a collective call."""
    for owner, theirs in enumerate(gather_over(list(names), group)):
        yield from ((name, owner) for name in theirs)


@contextmanager
def quiet_redistribution() -> Iterator[None]:
    """Without torch's remark that a tensor cut twice on one dim is gathered in two steps: whole tensors are rare here."""
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def send_to_first(
    tensor: torch.Tensor | None, *, owner: int, group: dist.ProcessGroup, device: torch.device
) -> torch.Tensor | None:
    """Bring the owner's tensor to place 0 of the pp axis; the others get None.

    Args:
        tensor: on the owner, any shape of up to six dims; elsewhere it is not read.
        owner: its place in `group`.
        group: the pp ranks.
        device: where they compute.
    """
    place = dist.get_rank(group)
    if owner == 0 or place not in (0, owner):
        return tensor if place == owner else None
    head = torch.zeros(2 + _DIMS, dtype=torch.int64, device=device)  # [dtype, dims, sizes]
    if place == owner:
        assert tensor is not None
        head[: 2 + tensor.dim()] = torch.tensor([DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape])
        dist.send(head, group_dst=0, group=group)
        dist.send(tensor.contiguous(), group_dst=0, group=group)
        return None
    dist.recv(head, group_src=owner, group=group)
    kind, dims, *sizes = head.tolist()
    received = torch.empty(sizes[:dims], dtype=DTYPES[kind], device=device)
    dist.recv(received, group_src=owner, group=group)
    return received
