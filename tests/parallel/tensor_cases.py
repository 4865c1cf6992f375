"""What a tensor-parallel model computes, to compare with one process: losses and whole gradients, by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distllm.comm import World
from distllm.config.schema import Config
from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms
from distllm.models.build import initial_tensors, meta_model, resolve_spec
from distllm.models.spec import ModelSpec
from distllm.parallel.data import apply_fsdp
from distllm.parallel.mesh import AXES, build_mesh
from distllm.parallel.packing import Packing, packings
from distllm.parallel.parallelize import fill, find_blocks
from distllm.parallel.tensor import apply_tp
from distllm.train.objectives import causal_lm, masked_lm
from tests.models.families import config_of, random_ids
from tests.models.heads import ROLES, VOCABULARY, batch_of, head_config
from tests.wide import KeepWide

DECODERS = ("llama", "qwen3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe")
OTHERS = ("bert", "roberta", "distilbert", "t5", "bart", "marian")


@dataclass(frozen=True)
class Case:
    """A model, its numbers, and a batch."""

    spec: ModelSpec
    tensors: Mapping[str, torch.Tensor]
    batches: Sequence[Batch]
    objective: Callable[..., LossTerms]

    def to(self, dtype: torch.dtype) -> Case:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.tensors.items()}
        return replace(self, tensors=tensors)


def case_of(kind: str, *, dropout: float = 0.0, **sizes: Any) -> Case:
    """A tiny model of a family with larger weights than its init gives, so that every gradient matters."""
    if kind in DECODERS:
        spec, objective = _spec(config_of(kind, **sizes), vocab_size=300, dropout=dropout), causal_lm
        batches = [causal_batch(2, 16, seed=seed) for seed in (0, 1)]
    else:
        if kind == "marian":
            sizes = {"scale_embedding": True} | sizes  # as its real models; without it, fp32 gradients of queries are noise
        task = "masked_lm" if kind in OTHERS[:3] else "seq2seq"
        objective = masked_lm if task == "masked_lm" else causal_lm
        spec = _spec(head_config(kind, task, **sizes), vocab_size=VOCABULARY, dropout=dropout)
        batches = [batch_of(task, count=6, seed=seed) for seed in (0, 1)]
    return Case(spec, enlarged(spec), batches, objective)


def _spec(config: Config, *, vocab_size: int, dropout: float) -> ModelSpec:
    model = config.model.model_copy(update={"dropout": dropout})
    return resolve_spec(config.model_copy(update={"model": model}), vocab_size=vocab_size, roles=ROLES)


def causal_batch(rows: int, length: int, *, seed: int, vocabulary: int = 300) -> Batch:
    ids = random_ids(rows, length + 1, seed=seed) % vocabulary
    labels = ids[:, 1:].clone()
    labels[0, : 3 + seed] = IGNORE
    return Batch({"input_ids": ids[:, :-1]}, {"labels": labels}, tuple(range(rows)))


def enlarged(spec: ModelSpec, *, seed: int = 1) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    parameters = {name for name, _ in meta_model(spec).named_parameters()}
    for name, tensor in initial_tensors(spec, seed=seed):
        more = torch.randn(tensor.shape, generator=draw) * 0.05 if name in parameters else 0
        tensors[name] = tensor + more
    return tensors


@dataclass(frozen=True)
class Answer:
    """What a rank found."""

    losses: list[float]
    gradients: dict[str, np.ndarray]
    """Whole, of all batches together."""


def reference(case: Case, *, train: bool = True) -> Answer:
    """One process."""
    model = _on_meta(case)
    fill(model, case.tensors.items(), device=torch.device("cpu"))
    return _run(case, model.train(train), packed={})


def _on_meta(case: Case) -> nn.Module:
    dtype = next(t.dtype for t in case.tensors.values() if t.is_floating_point())
    model = meta_model(case.spec).to(dtype)
    if dtype == torch.float64:  # the grouped product of experts has no fp64
        for module in model.modules():
            if hasattr(config := getattr(module, "config", None), "_experts_implementation"):
                config._experts_implementation = "eager"
    return model


def laid_out(
    case: Case, world: World, *, tp: int, shard: int = 1, replicate: int = 1, sequence: bool = False,
    loss_parallel: bool = True, compute: torch.dtype = torch.float32, prepare: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, Mapping[str, Packing], int]:  # fmt: skip
    """A case's model on its ranks; its packed parameters; and this rank's number among those that read other samples."""
    sizes = dict.fromkeys(AXES, 1) | {"tp": tp, "dp_shard": shard, "dp_replicate": replicate}
    mesh = build_mesh(world, sizes=sizes)
    model = _on_meta(case)
    apply_tp(model, mesh, spec=case.spec, sequence_parallel=sequence, loss_parallel=loss_parallel)
    packed = packings(model)
    blocks = find_blocks(model, spec=case.spec)
    if prepare is not None:
        prepare(model)
    apply_fsdp(model, mesh, blocks=blocks, compute_dtype=compute, reshard_after_forward=True)
    ordered = ((n, in_rank_order(t, packed[n]) if n in packed else t) for n, t in case.tensors.items())
    fill(model, ordered, device=world.device)
    return model, packed, mesh.dp_rank


def parallel_answer(case: Case, world: World, *, train: bool = True, autocast: bool = False, **layout: Any) -> Answer:
    """A rank of a layout; `case.batches` are spread over the ranks that read different samples."""
    model, packed, dp_rank = laid_out(case, world, **layout)
    dp = layout.get("shard", 1) * layout.get("replicate", 1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return _run(replace(case, batches=case.batches[dp_rank::dp]), model.train(train), packed=packed)


def _run(case: Case, model: nn.Module, *, packed: Mapping[str, Packing]) -> Answer:
    losses = []
    for batch in case.batches:
        with KeepWide():
            terms = case.objective(model(**batch.inputs), batch)
        terms.sum.backward()
        losses.append(float(terms.sum.detach()))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    gradients = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} has no gradient"
            gradients[name] = whole(p.grad, packed.get(name)).numpy()
    return Answer(losses, gradients)


def whole(tensor: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """All of a tensor, in the model's own order."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if packing is None:
        return full
    out = torch.empty_like(full)
    for inside, at, length in packing.boxes(0, full.shape[packing.dim], whole=full.shape[packing.dim]):
        out.narrow(packing.dim, at, length).copy_(full.narrow(packing.dim, inside, length))
    return out


def in_rank_order(tensor: torch.Tensor, packing: Packing) -> torch.Tensor:
    """A packed tensor with the ranks' pieces one after another."""
    boxes = packing.boxes(0, tensor.shape[packing.dim], whole=tensor.shape[packing.dim])
    return torch.cat([tensor.narrow(packing.dim, at, length) for _, at, length in boxes], packing.dim)


def assert_close(found: Answer, wanted: Answer, *, bound: float, losses: Sequence[float] | None = None) -> None:
    """Losses and gradients agree: max|g - g_ref| / max|g_ref| of each parameter.

    A gradient that is nothing but rounding (a key's bias moves no softmax) is compared with the largest of all instead.
    """
    np.testing.assert_allclose(found.losses, wanted.losses if losses is None else losses, rtol=bound, atol=0)
    assert found.gradients.keys() == wanted.gradients.keys()
    largest = max(float(np.abs(g).max()) for g in wanted.gradients.values())
    assert largest > 0.01
    for name, gradient in wanted.gradients.items():
        size = float(np.abs(gradient).max())
        size = size if size > 1e-6 * largest else largest
        error = float(np.abs(found.gradients[name] - gradient).max()) / size
        assert error <= bound, f"{name}: {error:.1e} > {bound:.0e}"
