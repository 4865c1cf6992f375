"""Cutting a batch along the sequence: which tokens each context-parallel rank holds, and all that goes with a token.

Shapes: B batch, S tokens of the whole sequence, M tokens of a rank.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from distllm.config.errors import ConfigError
from distllm.data.batch import IGNORE, Batch
from distllm.parallel.blocks import Ranges
from distllm.parallel.mesh import Mesh
from distllm.parallel.ring import zigzag
from distllm.parallel.ulysses import straight

Method = Literal["ring", "all_gather", "ulysses"]


def tokens_of(rank: int, *, ranks: int, seq_len: int, method: Method) -> Ranges:
    """Where the tokens stand that a rank holds, in the order in which it holds them."""
    return (straight if method == "ulysses" else zigzag)(rank, ranks=ranks, seq_len=seq_len)


def cut_batch(batch: Batch, mesh: Mesh, *, method: Method) -> Batch:
    """This rank's part of every sequence; the batch itself where cp is 1.

    Args:
        batch: `input_ids` [B, S] and what else has a number for each token; targets [B, S]. An `attention_mask` bool
            [B, 1, S, S] is that of `data.cross_documents=false`, whose `position_ids` begin at 0 in each document; one of
            [B, S] is nonzero for tokens that are no padding. Rows that do not divide are filled up with padding.
        mesh: its cp axis shares the sequence.
        method: decides which tokens are whose; the model's attention was replaced with the same.

    Returns:
        Inputs and targets [B, M], always with `position_ids`. Where a mask came, `attention_mask` is now the short form that
        the replaced attention takes, the same on all ranks: int32 [B, 1, 1, S], where the document of each token begins,
        or int8 [B, 1, 1, S], 1 for tokens that are no padding.

    Raises:
        ConfigError: something is not one number a token.
    """
    ranks = mesh.sizes["cp"]
    if ranks == 1:
        return batch
    batch = _filled_up(batch, ranks=ranks, parts=ranks if method == "ulysses" else 2 * ranks)
    shape = batch.inputs["input_ids"].shape
    inputs = dict(batch.inputs)
    mask = inputs.pop("attention_mask", None)
    if "position_ids" not in inputs:
        inputs["position_ids"] = torch.arange(shape[1], device=inputs["input_ids"].device).expand(shape)
    for name, tensor in (inputs | batch.targets).items():
        if tensor.shape[:2] != shape:
            rule = f"cuts sequences, and {name} {list(tensor.shape)} is not one number for each of {list(shape)} tokens"
            raise ConfigError([f"layout.cp={ranks}: {rule}; nearest: 1"])
    mine = tokens_of(mesh.coordinates()["cp"], ranks=ranks, seq_len=shape[1], method=method)
    held = {name: _take(tensor, mine) for name, tensor in inputs.items()}
    if mask is not None:
        held["attention_mask"] = _short(mask, batch.inputs)[:, None, None]
    return Batch(held, {name: _take(tensor, mine) for name, tensor in batch.targets.items()}, batch.sample_ids)


def _take(tensor: torch.Tensor, mine: Ranges) -> torch.Tensor:
    return torch.cat([tensor[:, run.start : run.stop] for run in mine], 1)


def _short(mask: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mask as one number a token, [B, S]."""
    if mask.dim() == 2:
        return (mask != 0).to(torch.int8)
    positions = inputs["position_ids"]  # a token that is the i-th of its document stands i after the document's beginning
    return (torch.arange(positions.shape[1], device=positions.device) - positions).to(torch.int32)


def _filled_up(batch: Batch, *, ranks: int, parts: int) -> Batch:
    """The batch with padding after each row, so that `parts` divides its length."""
    rows = batch.inputs["input_ids"]
    missing = -rows.shape[1] % parts
    if missing == 0:
        return batch
    inputs = dict(batch.inputs)
    mask = inputs.pop("attention_mask", None)
    if mask is not None and mask.dim() == 4:
        rule = f"must cut rows of {rows.shape[1]} tokens in {parts} equal parts"
        raise ConfigError([f"layout.cp={ranks}: {rule}; nearest: data.seq_len={rows.shape[1] + missing}"])
    seen = torch.ones_like(rows) if mask is None else mask
    given = {name: F.pad(tensor, (0, missing)) for name, tensor in (inputs | {"attention_mask": seen}).items()}
    targets = {name: F.pad(tensor, (0, missing), value=IGNORE) for name, tensor in batch.targets.items()}
    return Batch(given, targets, batch.sample_ids)
