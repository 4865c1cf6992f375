"""Tiny mixture-of-experts models laid out over ep, as `parallelize` does it, and the same on one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distllm.comm import World
from distllm.config.schema import MoeConfig
from distllm.data.batch import IGNORE, Batch
from distllm.models.hf import spec_from_config
from distllm.models.spec import ModelSpec
from distllm.parallel.data import shard_dim
from distllm.parallel.expert import apply_ep, check_experts, expert_modules
from distllm.parallel.mesh import AXES, Mesh, build_mesh
from distllm.parallel.parallelize import fill, find_blocks

VOCAB, SEQ, EXPERTS = 41, 7, 4


def moe_spec(family: str, *, experts: int = EXPERTS, **sizes: Any) -> ModelSpec:
    from transformers import AutoConfig

    common = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    own = {
        "mixtral": {"intermediate_size": 24, "num_local_experts": experts},
        "qwen3_moe": {
            "moe_intermediate_size": 24, "intermediate_size": 32, "num_experts": experts, "head_dim": 4, "mlp_only_layers": [0],
        },
    }[family]  # fmt: skip
    return spec_from_config(AutoConfig.for_model(family, **(common | own | sizes)))


def moe_tensors(spec: ModelSpec, *, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Weights with which routers disagree, whole."""
    torch.manual_seed(3)
    with torch.device("meta"):
        model = spec.build()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    weights = {name: 0.3 * torch.randn(shape, dtype=torch.float64) + ("norm" in name) for name, shape in shapes.items()}
    buffers = dict(spec.build().named_buffers())
    return {n: t.to(dtype) for n, t in weights.items()} | {n: b.detach().clone() for n, b in buffers.items()}


def moe_batch(ids: Sequence[int]) -> Batch:
    """Samples by number: real tokens from the left, a number that depends on the sample; fewer labels still."""
    rows, masks, labels = [], [], []
    for i in ids:
        generator = torch.Generator().manual_seed(100 + i)
        rows.append(torch.randint(0, VOCAB, (SEQ,), generator=generator))
        masks.append(torch.arange(SEQ) < SEQ - i % 3)
        label = torch.randint(0, VOCAB, (SEQ,), generator=generator)
        label[: 1 + i % 2] = IGNORE
        labels.append(label.where(masks[-1], IGNORE))
    inputs = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
    return Batch(inputs, {"labels": torch.stack(labels)}, tuple(ids))


def loss_sum(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(**batch.inputs).logits
    flat = batch.targets["labels"].flatten()
    return nn.functional.cross_entropy(logits.flatten(0, 1), flat, ignore_index=IGNORE, reduction="sum")


def one_process(spec: ModelSpec, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.device("meta"):
        model = spec.build().to(dtype)
    model.set_experts_implementation("eager")  # transformers' default is torch's grouped product, which knows no fp64
    fill(model, tensors.items(), device=torch.device("cpu"))
    return model.train()


def on_mesh(
    world: World, spec: ModelSpec, tensors: dict[str, torch.Tensor], *, sizes: dict[str, int],
    dtype: torch.dtype = torch.float64, compute: torch.dtype | None = None,
    prepare: Callable[[nn.Module], None] | None = None, even: bool = False,
) -> tuple[nn.Module, Mesh]:  # fmt: skip
    """The model spread over ep and sharded as `apply_fsdp` would: experts apart, then blocks, then the rest."""
    mesh = build_mesh(world, sizes=dict.fromkeys(AXES, 1) | sizes)
    with torch.device("meta"):
        model = spec.build().to(dtype)
    check_experts(model, plan=spec.ep_plan, ep=mesh.sizes["ep"], moe=MoeConfig())
    apply_ep(model, mesh, plan=spec.ep_plan, even=even)
    if prepare is not None:
        prepare(model)
    low = compute is not None
    policy = MixedPrecisionPolicy(compute, torch.float32) if low else MixedPrecisionPolicy()
    apart = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False) if low else MixedPrecisionPolicy()
    experts, dense = mesh.weight_mesh(experts=True), mesh.weight_mesh()
    if dense is not None:
        for module in expert_modules(model, plan=spec.ep_plan).values():
            fully_shard(module, mesh=experts, mp_policy=apart, shard_placement_fn=shard_dim(shards=experts.size(-1)))
        for block in find_blocks(model, spec=spec):
            fully_shard(block, mesh=dense, mp_policy=policy)
        fully_shard(model, mesh=dense, mp_policy=policy, reshard_after_forward=False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    fill(model, tensors.items(), device=torch.device("cpu"))
    return model.train(), mesh


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Any]:
    """Every gradient, whole, as numpy."""
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        found[name] = whole(p.grad.detach()).numpy().copy()
    return found


def worst(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest error of any value, relative to the largest of its tensor, of the worst tensor."""
    assert found.keys() == wanted.keys()
    return max(float(np.abs(found[n] - wanted[n]).max() / np.abs(wanted[n]).max()) for n in wanted)
