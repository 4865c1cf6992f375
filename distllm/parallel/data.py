"""Data parallelism: DDP (replicate), FSDP2 (shard) and HSDP (replicate x shard).

Gradients are added over ranks, never averaged: the engine divides once, by the global count of targets. torch's
defaults average, so both wrappers are told to sum.
"""

# No `from __future__ import annotations` here: DDP reads the types of a communication hook and wants them real.
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from distllm.parallel.mesh import Mesh


def apply_fsdp(
    model: nn.Module,
    mesh: Mesh,
    *,
    blocks: Sequence[nn.Module],
    compute_dtype: torch.dtype,
    reshard_after_forward: bool,
    experts: Sequence[nn.Module] = (),
) -> nn.Module:
    """Shard every parameter over dp_shard, ep and cp, a block at a time, in place; nothing where these are of size 1.

    Args:
        model: the whole module, or a pipeline stage of it, on meta.
        mesh: with dp_replicate > 1 too, this is HSDP: sharded inside a replica, all-reduced across replicas.
        blocks: the units that are gathered together; what is outside them is one unit of its own.
        compute_dtype: the dtype of gathered parameters and of the products; the shards stay fp32, and so does the
            reduction of gradients.
        reshard_after_forward: free a block's gathered parameters after its forward pass.
        experts: modules inside the blocks that ep has spread, which are units of their own on what is left of the mesh.

    Returns:
        `model`, its parameters now DTensors under the same names.
    """
    submesh = mesh.weight_mesh()
    if submesh is None:
        return model
    # A head with a bias returns a view of its product, and torch warns of writing into it, which nobody here does.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    low = compute_dtype not in (torch.float32, torch.float64)
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32) if low else MixedPrecisionPolicy()
    for module in experts:
        _shard_experts(module, mesh, compute_dtype=compute_dtype, reshard_after_forward=reshard_after_forward)
    for block in blocks:
        fully_shard(block, mesh=submesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # What is outside the blocks is needed again at the beginning of the backward pass: it stays gathered.
    fully_shard(model, mesh=submesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The factor 1 alone would ask for PREMUL_SUM, which gloo has not; with the second line it is a plain SUM.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def _shard_experts(
    module: nn.Module, mesh: Mesh, *, compute_dtype: torch.dtype, reshard_after_forward: bool
) -> None:
    """Shard experts over what ep leaves of the shard axes, inside each expert: a rank has few of them."""
    submesh = mesh.weight_mesh(experts=True)
    assert submesh is not None
    low = compute_dtype not in (torch.float32, torch.float64)
    # Their inputs are not cast: the router's scores among them are fp32 and stay so.
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False) if low else MixedPrecisionPolicy()
    fully_shard(
        module, mesh=submesh, mp_policy=policy, reshard_after_forward=reshard_after_forward,
        shard_placement_fn=shard_dim(shards=submesh.size(-1)),
    )  # fmt: skip


def shard_dim(*, shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """For `fully_shard(experts, shard_placement_fn=...)`: cut inside each expert, not between them.

    A rank has few experts, often fewer than there are shards, and FSDP pads what it cuts on dim 0.

    Args:
        shards: ranks over which FSDP shards experts.

    Returns:
        parameter [E, ., .] -> the first dim behind the experts that `shards` divides; None (dim 0) where neither does.
    """

    def placement(parameter: nn.Parameter) -> Shard | None:
        return next((Shard(dim) for dim in range(1, parameter.dim()) if parameter.shape[dim] % shards == 0), None)

    return placement


def apply_ddp(model: nn.Module, mesh: Mesh) -> nn.Module:
    """Wrap `model` so that gradients are added over dp_replicate; returns `model` itself on an axis of size 1.

    Unlike the other parallelisms this returns a wrapper, because DDP's hooks hang on its forward; names are read from
    `model`. The model must already hold its weights, equal on all ranks.
    """
    if mesh.sizes["dp_replicate"] == 1 or mesh.shards is not None:
        return model
    group = mesh.loss_group
    assert group is not None
    # torch 2.13 renamed broadcast_buffers and warns of the old name. Buffers are computed alike on every rank.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(
        model, process_group=group, gradient_as_bucket_view=True, init_sync=False, **buffers
    )
    wrapped.register_comm_hook(group, _add_bucket)
    return wrapped


def _add_bucket(
    group: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Add one bucket of gradients over the replicas, where DDP by default would average it."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    take_first: Callable[[torch.futures.Future[list[torch.Tensor]]], torch.Tensor] = lambda done: done.value()[0]  # noqa: E731
    return work.get_future().then(take_first)


def set_last_microbatch(forward: nn.Module, last: bool, *, readable: bool = False) -> None:
    """Tell the wrapper whether this is the last micro-batch of the step.

    DDP sends gradients only then. FSDP2 reduce-scatters every micro-batch, so that no rank ever holds whole gradients;
    across replicas (HSDP) the shards are all-reduced at the last.

    Args:
        forward: what `parallelize` gave to call.
        last: whether this is the last.
        readable: whether the gradients so far will be read before the next: then the device waits for FSDP's reduction.
    """
    if isinstance(forward, DistributedDataParallel):
        forward.require_backward_grad_sync = last
    elif isinstance(forward, FSDPModule):
        forward.set_is_last_backward(last or readable)
        forward.set_requires_all_reduce(last)


def held_back_gradients(model: nn.Module) -> list[torch.Tensor]:
    """HSDP: this rank's shards of the gradients that its shard group has added up before the last micro-batch.

    Until it all-reduces them FSDP keeps them to itself, flat and padded with zeros, one tensor for each of its units; torch
    2.13 has no public name for them. Empty in every other layout, where gradients are with their parameters.
    """
    def groups_of(state: Any) -> list[Any]:  # torch 2.11 has at most one a unit, under another name
        if hasattr(state, "_fsdp_param_groups"):
            return list(state._fsdp_param_groups)
        return [] if state._fsdp_param_group is None else [state._fsdp_param_group]

    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    held = [group._partial_reduce_output for state in states for group in groups_of(state)]
    return [tensor for tensor in held if tensor is not None]
