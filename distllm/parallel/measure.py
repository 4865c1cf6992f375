"""What the parts of a model cost, measured on the device that will run them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from distllm.data.batch import Batch
from distllm.parallel.cut import Chain, Slot, apply_cut
from distllm.parallel.split import Costs

REPEATS = 3
"""Each part is run this often, and the fastest run counts: what disturbs a run makes it slower, never faster."""


def measured_costs(
    model: nn.Module,
    *,
    chain: Chain,
    rows: int,
    length: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Time forward and backward of each kind of block, alone, and of the first and last stage around one.

    Clocks differ between ranks, and all must cut alike: one rank measures and tells the others.

    Args:
        model: the whole module on meta; it stays as it is. One block and the ends are in memory at a time.
        chain: its parts.
        rows: B of a micro-batch.
        length: S.
        device: where to run.
        clock: seconds.

    Returns:
        The costs in seconds.
    """
    count = len(chain.blocks)
    kinds = [_kind(model.get_submodule(path)) for path in chain.blocks]
    # A block in the middle is alone on its stage; one of its kind stands for the others, but not the first or the last.
    middle = {kind: number for number, kind in enumerate(kinds) if 0 < number < count - 1}
    seconds = {kind: _seconds(model, chain, number, rows, length, device, clock) for kind, number in middle.items()}
    first, last = (_seconds(model, chain, number, rows, length, device, clock) for number in (0, count - 1))
    blocks = tuple(seconds.get(kind, first if number == 0 else last) for number, kind in enumerate(kinds))
    return Costs(blocks, max(0.0, first - blocks[0]), max(0.0, last - blocks[-1]))


def _kind(block: nn.Module) -> tuple[object, ...]:
    """Blocks that are alike cost alike."""
    return type(block), *((name, tuple(p.shape)) for name, p in block.named_parameters())


def _seconds(
    model: nn.Module, chain: Chain, number: int, rows: int, length: int, device: torch.device, clock: Callable[[], float]
) -> float:
    """The time of one micro-batch on a stage of one block, with what stands before or after it."""
    slot = Slot(finish=lambda outputs, batch: getattr(outputs, "logits", outputs).float().sum())
    stage = apply_cut(copy.deepcopy(model), chain=chain, blocks=range(number, number + 1), index=number, slot=slot).module
    stage.to_empty(device=device).train()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.normal_(std=0.02)
        for buffer in stage.buffers():
            buffer.zero_()
    batch = Batch({"input_ids": torch.zeros(rows, length, dtype=torch.int64, device=device)}, {}, ())
    hidden = torch.zeros(rows, length, chain.width, device=device, requires_grad=True)
    best = float("inf")
    for _ in range(REPEATS):
        slot.waiting.append(batch)
        _wait(device)
        begin = clock()
        stage(hidden).sum().backward()
        _wait(device)
        best = min(best, clock() - begin)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
