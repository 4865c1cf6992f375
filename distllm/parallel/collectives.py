"""Collectives that autograd goes through, in conjugate pairs: what one does forward, the other does backward.

`None` is a group of one: every function then returns its input. All of them work on plain tensors, leave their input as
it is, and stand outside of compiled graphs (a collective in the middle of a graph gains nothing, and what the compiler
makes of an asynchronous one has given wrong gradients).

Shapes: G ranks of the group; `...` any dims; n the length of the dim that is cut.
Source: Shoeybi et al. 2019, arXiv 1909.08053 (f and g); Korthikanti et al. 2022, arXiv 2205.05198 (g and g-bar).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 renamed both and warns of the old names, which are all that 2.11 has.
if hasattr(dist, "all_gather_single"):
    _all_gather_into, _reduce_scatter_into = dist.all_gather_single, dist.reduce_scatter_single
else:
    _all_gather_into, _reduce_scatter_into = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

Group = dist.ProcessGroup | None


def copy_to(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Give each rank the same tensor to do its part of the work with.

    Backward adds the ranks' gradients, because each rank's is only what its part of the work sends back.

    Args:
        tensor: [...], equal on all ranks.
        group: the ranks; None: a group of one.

    Returns:
        [...], the same values.
    """
    return tensor if group is None else _apply(_Copy, tensor, group)


def copy_all_to(tensors: tuple[torch.Tensor, ...], group: Group) -> tuple[torch.Tensor, ...]:
    """`copy_to` of several tensors whose gradients travel together, as one flat tensor for each dtype.

    Args:
        tensors: each [...], equal on all ranks; they have gradients at the same time, such as the norms of one block.
        group: the ranks; None: a group of one.
    """
    if group is None or not tensors:
        return tensors
    copied: tuple[torch.Tensor, ...] = _apply(_CopyAll, group, *tensors)
    return copied


def reduce_from(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Add the ranks' parts of a result.

    Backward is the identity: each part enters the sum with factor 1, and all ranks go on with the same sum.

    Args:
        tensor: [...], this rank's part.
        group: the ranks; None: a group of one.

    Returns:
        [...], the sum, equal on all ranks.
    """
    return tensor if group is None else _apply(_Reduce, tensor, group)


def gather_from(tensor: torch.Tensor, group: Group, *, dim: int, partial: bool = True) -> torch.Tensor:
    """Put the ranks' slices together.

    Args:
        tensor: [..., n, ...], this rank's slice; of the same shape on all ranks.
        group: the ranks; None: a group of one.
        dim: where the slices are put together.
        partial: what comes back. True: each rank goes on with a part of the work of its own, so the gradients are added
            and each rank gets its slice of the sum (reduce-scatter). False: all ranks do the same with the result, so all
            have the whole gradient, and each takes its slice.

    Returns:
        [..., G * n, ...], equal on all ranks.
    """
    return tensor if group is None else _apply(_Gather, tensor, group, dim % tensor.dim(), partial)


def scatter_to(tensor: torch.Tensor, group: Group, *, dim: int) -> torch.Tensor:
    """Take this rank's slice of what all ranks have; backward puts the slices' gradients together (all-gather).

    Args:
        tensor: [..., G * n, ...], equal on all ranks.
        group: the ranks; None: a group of one.
        dim: the dim that is cut.

    Returns:
        [..., n, ...].
    """
    return tensor if group is None else _apply(_Scatter, tensor, group, dim % tensor.dim())


def reduce_scatter_to(tensor: torch.Tensor, group: Group, *, dim: int) -> torch.Tensor:
    """Add the ranks' parts of a result and keep this rank's slice of the sum; backward is an all-gather.

    Args:
        tensor: [..., G * n, ...], this rank's part.
        group: the ranks; None: a group of one.
        dim: the dim that is cut.

    Returns:
        [..., n, ...].
    """
    return tensor if group is None else _apply(_ReduceScatter, tensor, group, dim % tensor.dim())


def all_to_all(tensor: torch.Tensor, group: Group, *, split: int, concat: int) -> torch.Tensor:
    """Cut one dim among the ranks and put another, which was cut, together; backward is the same the other way round.

    Nothing is added: every value stands on one rank before and on one rank after.

    Args:
        tensor: [..., G * n, ..., m, ...].
        group: the ranks; None: a group of one.
        split: the dim of length G * n.
        concat: the dim of length m.

    Returns:
        [..., n, ..., G * m, ...].
    """
    if group is None:
        return tensor
    return _apply(_AllToAll, tensor, group, split % tensor.dim(), concat % tensor.dim())


def gathered(tensor: torch.Tensor, group: dist.ProcessGroup, *, dim: int) -> torch.Tensor:
    """All ranks' slices [..., n, ...] put together along `dim`: [..., G * n, ...]; without autograd."""
    size = dist.get_world_size(group)
    out = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:]) if tensor.dim() else (size,))
    _all_gather_into(out, tensor.contiguous(), group=group)
    if dim == 0:
        return out
    parts = out.view(size, *tensor.shape).movedim(0, dim)  # [..., G, n, ...]
    return parts.reshape(*tensor.shape[:dim], size * tensor.shape[dim], *tensor.shape[dim + 1 :])


def scattered_sum(tensor: torch.Tensor, group: dist.ProcessGroup, *, dim: int) -> torch.Tensor:
    """This rank's slice [..., n, ...] of the sum of all ranks' [..., G * n, ...]; without autograd."""
    size = dist.get_world_size(group)
    assert tensor.shape[dim] % size == 0, f"dim {dim} of {list(tensor.shape)} cannot be cut into {size}"
    shape = (*tensor.shape[:dim], tensor.shape[dim] // size, *tensor.shape[dim + 1 :])
    first = tensor.unflatten(dim, (size, shape[dim])).movedim(dim, 0).contiguous()  # [G, ..., n, ...]
    out = tensor.new_empty(shape)
    _reduce_scatter_into(out.view(-1), first.view(-1), group=group)
    return out


def summed(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of all ranks' tensors, in new memory; without autograd."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def exchanged(tensor: torch.Tensor, group: dist.ProcessGroup, *, split: int, concat: int) -> torch.Tensor:
    """`all_to_all` without autograd."""
    size = dist.get_world_size(group)
    parts = tensor.unflatten(split, (size, tensor.shape[split] // size)).movedim(split, 0).contiguous()
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=group)
    # [G, rest]: the leading dim counts the ranks that the pieces come from, which is the outer part of `concat`.
    shape = list(parts.shape[1:])
    shape[concat] *= size
    return out.movedim(0, concat).reshape(shape)


def own_slice(tensor: torch.Tensor, group: dist.ProcessGroup, *, dim: int) -> torch.Tensor:
    """This rank's slice of a tensor whose length along `dim` is a multiple of the group's size; in its own memory."""
    size = dist.get_world_size(group)
    assert tensor.shape[dim] % size == 0, f"dim {dim} of {list(tensor.shape)} cannot be cut into {size}"
    return tensor.chunk(size, dim)[dist.get_rank(group)].contiguous()


@torch.compiler.disable
def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return summed(grads[0], ctx.group), None


class _CopyAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        totals: list[torch.Tensor | None] = [None] * len(grads)
        for dtype in dict.fromkeys(grad.dtype for grad in grads):
            places = [i for i, grad in enumerate(grads) if grad.dtype == dtype]
            flat = torch.cat([grads[i].reshape(-1) for i in places])
            dist.all_reduce(flat, group=ctx.group)
            for i, part in zip(places, flat.split([grads[i].numel() for i in places]), strict=True):
                totals[i] = part.view(grads[i].shape)
        return (None, *totals)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup, dim: int, partial: bool) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.partial = group, dim, partial
        return gathered(tensor, group, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        back = scattered_sum if ctx.partial else own_slice
        return back(grads[0], ctx.group, dim=ctx.dim), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return own_slice(tensor, group, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return gathered(grads[0], ctx.group, dim=ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return scattered_sum(tensor, group, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return gathered(grads[0], ctx.group, dim=ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup, split: int, concat: int) -> torch.Tensor:
        ctx.group, ctx.split, ctx.concat = group, split, concat
        return exchanged(tensor, group, split=split, concat=concat)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return exchanged(grads[0], ctx.group, split=ctx.concat, concat=ctx.split), None, None, None
