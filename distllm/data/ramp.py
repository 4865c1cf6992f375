"""Ramps: a batch or a length that grows with the samples consumed. Pure functions of where a step begins."""

from __future__ import annotations

import torch

from distllm.config.check import Resolved
from distllm.data.batch import Batch
from distllm.data.samples import StepPlan


def ramped(start: int, *, resolved: Resolved, samples: int) -> StepPlan:
    """The step that begins at `start` while the global batch grows in whole micro-batches of all ranks.

    Args:
        start: samples consumed so far.
        resolved: the batch that the ramp leads to.
        samples: how long the ramp is; 0: the whole batch from the beginning. The batch grows linearly with the samples
            consumed (as the ramp of Megatron-LM does), from one micro-batch a rank on.
    """
    whole, micro_batch = resolved.accumulation, resolved.micro_batch
    accumulation = whole if start >= samples else min(whole, 1 + start * whole // samples)
    size = accumulation * micro_batch * resolved.dp_size
    return StepPlan(range(start, start + size), accumulation, micro_batch)


def ramped_length(start: int, *, samples: int, first: int, last: int) -> int:
    """The tokens of a row of the step that begins at `start`: first, 2 first, 4 first, ... last, each for an equal share.

    Args:
        start: samples consumed so far.
        samples: how long the ramp is; 0: the whole length from the beginning.
        first: the length at the beginning.
        last: a power of two times `first`.
    """
    if start >= samples:
        return last
    doublings = (last // first).bit_length() - 1
    return first << min(doublings, start * doublings // samples)


def cut_rows(batch: Batch, length: int) -> Batch:
    """Cut every row of S tokens into S / length rows of `length` tokens: [B, S] becomes [B S / length, length].

    No token is lost; attention ends at the cuts. Positions of a row that is cut begin at 0 again.

    Args:
        batch: of packed text: tensors [B, S], and masks [B, 1, S, S].
        length: divides S.
    """
    rows, width = batch.inputs["input_ids"].shape
    pieces = width // length
    assert pieces * length == width, "the config is checked for it"
    inputs = {}
    for name, tensor in batch.inputs.items():
        if tensor.dim() == 4:
            cut = [tensor[:, :, i : i + length, i : i + length] for i in range(0, width, length)]
            inputs[name] = torch.stack(cut, dim=1).flatten(0, 1)
        else:
            inputs[name] = tensor.reshape(rows * pieces, length)
    if "position_ids" in inputs:
        positions = inputs["position_ids"]
        # A document that goes on across a cut begins anew there.
        started = positions[:, :1] + torch.arange(length)
        inputs["position_ids"] = positions - positions[:, :1] * (positions == started)
    targets = {name: tensor.reshape(rows * pieces, length) for name, tensor in batch.targets.items()}
    ids = tuple(i for i in batch.sample_ids for _ in range(pieces))
    return Batch(inputs, targets, ids)
