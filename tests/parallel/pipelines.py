"""Pipelines of tiny models on gloo ranks, and the same steps in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from distllm.comm import World
from distllm.config.check_pipeline import stage_owners
from distllm.config.schedule_csv import owners_of, read_order
from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms
from distllm.models.build import initial_tensors, meta_model
from distllm.models.hf import spec_from_config
from distllm.models.spec import ModelSpec
from distllm.parallel.data import apply_fsdp
from distllm.parallel.mesh import AXES, build_mesh
from distllm.parallel.parallelize import fill
from distllm.parallel.pipeline import Facts, Pipeline
from distllm.parallel.stages import Cut, apply_pp, own_blocks
from tests.models.families import VOCABULARY, spec_of
from tests.toy import VOCAB, toy_spec, toy_tensors

EVERY = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def virtual_of(schedule: str) -> int:
    return 1 if schedule in ("gpipe", "1f1b") else 2


@dataclass(frozen=True)
class Case:
    """A model, its batches and its layout."""

    family: str
    blocks: int = 4
    double: bool = True
    microbatches: int = 4
    pp: int = 2
    replicate: int = 1
    shard: int = 1
    packed: bool = False
    split: Sequence[int] = ()
    csv: str | None = None
    virtual: int | None = None
    low: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32

    def spec(self) -> ModelSpec:
        if self.family == "toy":
            return toy_spec()
        if self.family == "bert":
            return _bert(self.blocks)
        spec = spec_of(self.family, num_hidden_layers=self.blocks, **(NO_DROPOUT if self.family == "gpt2" else {}))
        if self.family == "mixtral":  # torch's grouped product has no fp64 on CPUs
            spec.hf_config._experts_implementation = "eager"
        return spec

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(toy_tensors() if self.family == "toy" else initial_tensors(self.spec(), seed=3))

    def batches(self, *, rows: int = 2, length: int = 8) -> list[Batch]:
        """Of all data-parallel ranks; their numbers of targets differ widely."""
        generator = torch.Generator().manual_seed(5)
        size = VOCAB if self.family == "toy" else VOCABULARY
        return [
            _batch(torch.randint(0, size, (2, rows, length), generator=generator), masked=i % length, packed=self.packed)
            for i in range(self.microbatches * self.replicate * self.shard)
        ]


def _bert(blocks: int) -> ModelSpec:
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": VOCABULARY}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return spec_from_config(BertConfig(num_hidden_layers=blocks, **sizes, **no_dropout), task="masked_lm")


def _batch(ids: torch.Tensor, *, masked: int, packed: bool) -> Batch:
    inputs, labels = ids.unbind()
    labels = labels.clone()
    labels[:, :masked] = IGNORE
    given = {"input_ids": inputs}
    if packed:  # two documents a row, the second from place 3 on
        rows, length = inputs.shape
        document = (torch.arange(length) >= 3).long()
        given["position_ids"] = (torch.arange(length) - 3 * document).expand(rows, length).contiguous()
        mask = (document[:, None] == document) & torch.ones(length, length).tril().bool()
        given["attention_mask"] = mask.expand(rows, 1, length, length).contiguous()
    return Batch(given, {"labels": labels}, tuple(range(len(inputs))))


def terms(outputs: Any, batch: Batch) -> LossTerms:
    """As `causal_lm`, but fp64 stays fp64."""
    logits, labels = getattr(outputs, "logits", outputs).flatten(0, 1), batch.targets["labels"].flatten()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    correct, count = (logits.argmax(-1) == labels).sum(), (labels != IGNORE).sum()
    return LossTerms(total, count, {"correct": correct, "table": torch.stack([correct, count, count - correct]).view(3, 1)})


def one_process(case: Case) -> torch.nn.Module:
    model = meta_model(case.spec()).to(case.dtype)
    fill(model, case.tensors().items(), device=torch.device("cpu"))
    return model.train()


def step_of(model: torch.nn.Module, batches: Sequence[Batch]) -> np.ndarray:
    """[loss sum, count] of a step in one process; gradients are left in .grad."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        found = terms(model(**batch.inputs), batch)
        found.sum.backward()
        total += torch.stack([found.sum.detach().double(), found.count.double()])
    return total.numpy()


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Every gradient, whole; then they are cleared."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            found[name] = whole.numpy().copy()
        parameter.grad = None
    return found


def piped(world: World, case: Case, schedule: str, *, reshard: bool = True) -> tuple[Pipeline, Cut, list[Batch]]:
    """The pipeline of this rank, with its weights, and the batches that it reads."""
    sizes = dict.fromkeys(AXES, 1) | {"pp": case.pp, "dp_replicate": case.replicate, "dp_shard": case.shard}
    mesh = build_mesh(world, sizes=sizes)
    spec = case.spec()
    if case.csv is not None:
        owners = owners_of(read_order(Path(case.csv), pp=case.pp, microbatches=case.microbatches))
    else:
        owners = stage_owners(schedule, pp=case.pp, virtual=case.virtual or virtual_of(schedule))
    cut = apply_pp(
        meta_model(spec).to(case.dtype), rank=mesh.coordinates()["pp"], owners=owners, spec=spec, seq_len=8, split=case.split
    )
    tensors, computed = case.tensors(), torch.bfloat16 if case.low else case.dtype
    for stage in cut.stages:
        blocks = own_blocks(stage.module, spec=spec)
        apply_fsdp(stage.module, mesh, blocks=blocks, compute_dtype=computed, reshard_after_forward=reshard)
        held = {name for name, _ in [*stage.module.named_parameters(), *stage.module.named_buffers()]}
        fill(stage.module, ((n, t) for n, t in tensors.items() if n in held), device=world.device)
        stage.module.train()
    facts = Facts(schedule, cut.owners, cut.chain.width, computed, csv=case.csv, tied=cut.chain.tied)
    group = mesh.group("pp")
    assert group is not None
    pipeline = Pipeline(cut.stages, facts=facts, group=group, device=world.device)
    return pipeline, cut, case.batches()[mesh.dp_rank :: mesh.dp_size]


def worst(found: Sequence[dict[str, np.ndarray]], wanted: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest error relative to the largest number of its gradient, and whose; every gradient must be there."""
    assert {name for grads in found for name in grads} == set(wanted)
    return max(
        (float(np.abs(grad - wanted[name]).max() / np.abs(wanted[name]).max()), name)
        for grads in found
        for name, grad in grads.items()
    )
