"""Activation checkpointing: recompute what a block computed in the backward pass instead of keeping it, or keep it on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from distllm.config.errors import ConfigError
from distllm.config.schema import ActivationConfig

KEPT = {
    "matmul": ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._grouped_mm", "aten._scaled_mm"),
    "attention": (
        "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_cudnn_attention",
    ),
    "collectives": (
        "_c10d_functional.all_reduce", "_c10d_functional.all_gather_into_tensor", "_c10d_functional.reduce_scatter_tensor",
        "_c10d_functional.all_to_all_single",
    ),
}  # fmt: skip
"""What a name in `activation.keep` stands for: operators as torch calls them."""

SMALL = 1 << 16
"""Elements below which a tensor stays where it is: the copy's latency costs more than its memory."""


def apply_activation_checkpointing(blocks: Sequence[nn.Module], config: ActivationConfig) -> None:
    """Checkpoint all blocks, or each `every`-th, in place; names of modules and parameters stay.

    Args:
        blocks: the model's blocks in order.
        config: what is recomputed, kept and offloaded.

    Raises:
        ConfigError: `keep` names an operator that torch does not have.

    Source: Chen et al. 2016, arXiv 1604.06174; selective: Korthikanti et al. 2022, arXiv 2205.05198.
    """
    step = config.every if config.mode == "every" else 1
    recomputed = {} if config.mode == "none" else {id(block) for block in blocks[::step]}
    keep = operators(config.keep) if config.mode == "selective" else None
    for block in blocks:
        # The instance's forward shadows the class's, so that no wrapper module changes a name.
        if id(block) in recomputed:
            block.forward = _checkpointed(block.forward, keep=keep)
        if config.offload:  # outside: what a checkpoint keeps, its inputs, goes to the CPU too
            block.forward = partial(_offloaded, block.forward, block=block)


def _checkpointed(forward: Callable[..., Any], *, keep: frozenset[Any] | None) -> Callable[..., Any]:
    if keep is None:
        return partial(checkpoint, forward, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, keep))
    return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def _policy(keep: frozenset[Any], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in keep else CheckpointPolicy.PREFER_RECOMPUTE


def operators(names: Sequence[str]) -> frozenset[Any]:
    """The operators that names stand for.

    Args:
        names: keys of KEPT, or operators as `aten.mm` (all its overloads) or `aten.mm.default`.

    Raises:
        ConfigError: there is no such operator; one of KEPT that this torch lacks is left out.
    """
    found: set[Any] = set()
    for name in names:
        parts = [_overloads(operator) for operator in KEPT.get(name, (name,))]
        if not any(parts):
            raise ConfigError(
                [f"activation.keep={name}: is no operator of torch; nearest: {', '.join(KEPT)}, or a name like aten.mm"]
            )
        found.update(*parts)
    return frozenset(found)


def _overloads(name: str) -> set[Any]:
    namespace, _, rest = name.partition(".")
    packet_name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace, None), packet_name, None) if packet_name else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return set()
    wanted = [overload] if overload else packet.overloads()
    return {getattr(packet, o) for o in wanted if o in packet.overloads() and not o.endswith("out")}


def _offloaded(forward: Callable[..., Any], *args: Any, block: nn.Module, **kwargs: Any) -> Any:
    """Run a block with what it saves for its backward pass kept on the CPU."""
    mover = _Mover(block)
    with saved_tensors_hooks(mover.pack, mover.unpack):
        outputs = forward(*args, **kwargs)
    mover.moved.clear()  # the graph keeps the mover; each copy goes with the tensor that it stands for
    return outputs


@dataclass(frozen=True)
class _Moved:
    """A saved tensor that stands on the CPU."""

    copy: torch.Tensor
    device: torch.device
    shape: torch.Size


class _Mover:
    """Packs the saved tensors of one forward pass of one block: large ones that are no weights go to the CPU, each once.

    Three projections save one and the same input, some of them as a view of another shape; one copy serves all.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self.moved: dict[tuple[Any, ...], tuple[StorageWeakRef, torch.Tensor]] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Moved:
        if not self._worth(tensor):
            return tensor
        flat = tensor.view(-1) if tensor.is_contiguous() else tensor
        storage = tensor.untyped_storage()
        # The weak reference keeps the storage's number from being given to another while it stands here.
        key = (storage._cdata, tensor._version, flat.storage_offset(), flat.shape, flat.stride(), flat.dtype)
        if key not in self.moved:
            self.moved[key] = (StorageWeakRef(storage), to_cpu(flat))
        return _Moved(self.moved[key][1], tensor.device, tensor.shape)

    def unpack(self, packed: torch.Tensor | _Moved) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        back = packed.copy.to(packed.device, non_blocking=packed.copy.is_pinned())
        return back if back.shape == packed.shape else back.view(packed.shape)

    def _worth(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, DTensor) or not _on_device(tensor) or tensor.numel() < SMALL:
            return False
        own = tensor.untyped_storage()._cdata
        return all(own != p.untyped_storage()._cdata for p in _local(self._block))


def _on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


def _local(block: nn.Module) -> Iterator[torch.Tensor]:
    """The weights and buffers of a block as it computes with them; under FSDP the gathered ones."""
    for tensors in (block.parameters(), block.buffers()):
        for tensor in tensors:
            yield tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, pinned, on its way: whoever copies it back on the same stream comes after it."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor, non_blocking=True)
