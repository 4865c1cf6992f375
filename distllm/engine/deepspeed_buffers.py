"""The memory that parameters in files are read into, by the model: how many buffers, and how large.

DeepSpeed (0.19) reads a parameter into a buffer when a module that has it is called, and frees the buffer when it lets go
of the parameter; where none is free, it ends the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from distllm.config.deepspeed_json import FileBuffers

LEAST_BYTES = 2**20
"""A smaller part of a parameter stays in memory."""


def file_buffers(
    model: nn.Module,
    *,
    numbers: Mapping[str, int],
    ranks: int,
    number_bytes: int,
    recomputed: bool,
    whole: Sequence[nn.Module] = (),
) -> FileBuffers:
    """What a model needs of memory for its parameters in files.

    Args:
        model: on any device, tied.
        numbers: of each parameter by name, as far as tp has left them to a rank.
        ranks: over which ZeRO cuts each.
        number_bytes: of one number in a file.
        recomputed: whether blocks are computed again in the backward pass, beside the module that asks for it.
        whole: modules whose parameters are gathered together.
    """
    parts = {id(p): -(-numbers[name] // ranks) for name, p in model.named_parameters()}
    parts = {key: part for key, part in parts.items() if part * number_bytes >= LEAST_BYTES}
    at_once = max(len(parts.keys() & held) for held in _held_together(model, whole))
    if recomputed and not whole:
        at_once *= 2
    to_the_end = len(parts.keys() & _held_to_the_end(model))
    return FileBuffers(count=max(1, at_once + to_the_end), size=max(parts.values(), default=1))


def _held_together(model: nn.Module, whole: Sequence[nn.Module]) -> Iterator[set[int]]:
    """For each module the parameters that are gathered while it computes: its own, and those of the modules around it."""
    around: dict[str, set[int]] = {"": set()}
    leaves = {id(module) for module in whole}
    for path, module in model.named_modules():
        own = {id(p) for p in module.parameters(recurse=id(module) in leaves)}
        around[path] = own | (around[path.rpartition(".")[0]] if path else set())
        yield around[path]


def _held_to_the_end(model: nn.Module) -> set[int]:
    """The parameters that a backward pass gathers and lets go of at its end: token ids have no gradient to tell it sooner."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    return {id(table.weight) for table in tables}
