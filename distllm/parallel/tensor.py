"""Tensor parallelism: each rank of the tp axis has a part of every layer, and with it a part of every token's work.

A plan says for each layer how it is cut (tensor_styles.py), as data. Column-parallel layers read whole hidden states and
give a part of the features, row-parallel ones read that part and give a part of every sum, which is added: two all-reduces
of [B, S, D] a block forward, and two backward. With sequence parallel the residuals between them are cut along the sequence,
and each all-reduce is a reduce-scatter and an all-gather: the same bytes, but norms, dropout and what they keep for the
backward pass are spread over the ranks.

Shapes: B batch, S sequence, D hidden, V vocabulary, T ranks.
Source: Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, arXiv 2205.05198.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distllm.config.errors import ConfigError
from distllm.models.spec import ModelSpec
from distllm.parallel.collectives import copy_all_to, gather_from, scatter_to
from distllm.parallel.mesh import Mesh
from distllm.parallel.tensor_heads import Heads, heads_of, keep_own_heads
from distllm.parallel.tensor_params import Slot, TensorRanks, is_cut, piece_range, replace_forward, standing_in
from distllm.parallel.tensor_random import OwnRandomness, has_dropout
from distllm.parallel.tensor_styles import (
    COLWISE,
    PARAMETER_STYLES,
    SEQUENCE,
    STYLES,
    Entrance,
    LogitsForward,
    Site,
    as_logits,
    fits,
)


def apply_tp(
    model: nn.Module, mesh: Mesh, *, spec: ModelSpec, sequence_parallel: bool = False, loss_parallel: bool = True
) -> nn.Module:
    """Cut a model over the tp axis by its spec's plan, in place; nothing on an axis of size 1.

    Args:
        model: the whole module, or a pipeline stage of it, on meta, tied; `tp_problems` found nothing in the whole one.
        mesh: the ranks by axis.
        spec: its `tp_plan` says how layers are cut, its `blocks` and `head` where they are.
        sequence_parallel: in training, cut the residuals of the blocks along the sequence, whose length is then a
            multiple of T.
        loss_parallel: leave the head's logits cut along the vocabulary, a DTensor; otherwise gather them.

    Returns:
        `model`, every name as before. Parameters that are cut are DTensors on the tp axis; the others are plain, with equal
        and whole gradients on all ranks.
    """
    devices = mesh.submesh("tp")
    if devices is None:
        return model
    ranks = TensorRanks(devices, sequence_parallel, loss_parallel)
    ranks.register(model)
    blocks = [block for path in spec.blocks for block in _own_blocks(model, path)]
    if any(has_dropout(block) for block in blocks):
        ranks.random = OwnRandomness(ranks.rank)
    _cut_layers(ranks, model, plan=spec.tp_plan, head=spec.head, blocks=blocks)
    _refuse_half_tied(ranks, model)
    _cut_logits_bias(ranks, model)
    for block in blocks:
        _wrap_block(ranks, block, first=block is blocks[0], last=block is blocks[-1])
    return model


def planned(model: nn.Module, plan: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The modules and parameters that a plan names.

    Args:
        model: on any device.
        plan: pattern -> style; `*` is a number.

    Returns:
        Full name -> style, in the model's order; and the patterns that match nothing.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = {name: plan[pattern] for name in names if (pattern := re.sub(r"\b\d+\b", "*", name)) in plan}
    found |= {name: plan[name] for name in names if name in plan}
    matched = {re.sub(r"\b\d+\b", "*", name) for name in found} | set(found)
    return found, [pattern for pattern in plan if pattern not in matched]


@contextmanager
def whole_logits(model: nn.Module) -> Iterator[None]:
    """Let the head gather its logits, as writing text wants them, whatever the loss wants."""
    own = [vars(module).get("forward") for module in model.modules()]
    heads = [forward for forward in own if isinstance(forward, LogitsForward)]
    kept = [head.whole for head in heads]
    try:
        for head in heads:
            head.whole = True
        yield
    finally:
        for head, whole in zip(heads, kept, strict=True):
            head.whole = whole


def _own_blocks(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks that are here; those of other stages are gone, or have no parameters."""
    try:
        blocks = list(model.get_submodule(path).children())
    except AttributeError:
        return []
    return [block for block in blocks if next(block.parameters(), None) is not None]


def _cut_layers(
    ranks: TensorRanks, model: nn.Module, *, plan: Mapping[str, str], head: str | None, blocks: Sequence[nn.Module]
) -> None:
    """Apply each layer's style."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = _own_layers(ranks, modules, planned(model, plan)[0])
    entrances: dict[str, Entrance] = {}
    attention: dict[str, Heads] = {}
    done: set[int] = set()
    for name, style in found.items():
        owner, _, key = name.rpartition(".")
        if name not in modules:
            dim, parts = PARAMETER_STYLES[style]
            ranks.cut(modules[owner], key, dim=dim, parts=parts)
            continue
        if id(modules[name]) in done:  # T5 has one embedding under three names
            continue
        done.add(id(modules[name]))
        heads = heads_of(modules[owner])
        if heads is not None and style in ("colwise", "qkv_colwise"):
            attention[owner] = heads
        site = Site(name, modules[name], heads, entrances.setdefault(owner, Entrance(ranks)))
        STYLES["colwise_logits" if name == head else style](ranks, site)
    for owner, heads in attention.items():
        keep_own_heads(modules[owner], heads, size=ranks.size)
    for owner, names in readers(found, head=head).items():
        inside = any(modules[owner] is m for block in blocks for m in block.modules() if m is not block)
        if ranks.sequence_parallel and not (inside and all_cut(modules[owner], owner, found)):
            what = "does more with its hidden states than read them in layers of the plan"
            raise ConfigError(
                [f"layout.sequence_parallel=true: {owner or names[0]} {what}; nearest: layout.sequence_parallel=false"]
            )
        if ranks.sequence_parallel or len(names) > 1:
            _wrap_entrance(ranks, modules[owner], entrances[owner])


def _own_layers(ranks: TensorRanks, modules: Mapping[str, nn.Module], found: Mapping[str, str]) -> dict[str, str]:
    """Without what a pipeline stage has in place of another stage's layers, which computes with no parameter.

    In the whole model every style fitted its layer, so what does not fit here is such a stand-in.
    """
    own = {}
    for name, style in found.items():
        module = modules.get(name)
        if module is None or fits(module, style):
            own[name] = style
        else:  # it may hold a tied parameter, which then is cut by the layer that computes with it
            ranks.handled.update((id(module), key) for key in module._parameters)
    return own


def readers(found: Mapping[str, str], *, head: str | None) -> dict[str, list[str]]:
    """Which layers of a plan read whole hidden states, by the module that they are in; the head reads no residuals."""
    owners: dict[str, list[str]] = {}
    for name, style in found.items():
        owner = name.rpartition(".")[0]
        if style in COLWISE and name != head and owner not in found:  # experts read what the mixture gives them
            owners.setdefault(owner, []).append(name)
    return owners


def all_cut(module: nn.Module, name: str, found: Mapping[str, str]) -> bool:
    """Whether all layers of a module are in the plan, as those of an attention or an MLP are."""
    children = [key for key, child in module.named_children() if next(child.parameters(), None) is not None]
    return not module._parameters and all(f"{name}.{key}" in found for key in children)


def _wrap_entrance(ranks: TensorRanks, module: nn.Module, entrance: Entrance) -> None:
    """Let the entrance's tensors go when the module is done, and where residuals are cut, give it whole ones.

    Attention must see whole sequences itself, because it reads their length off its input. What comes back are the
    gradients of its layers, each a part; so it may do nothing else with them, such as adding them to its output.
    """
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if ranks.follows_sequence(module):
            args, kwargs = _with_states(args, kwargs, lambda x: gather_from(x, ranks.group, dim=SEQUENCE))
        try:
            return inner(*args, **kwargs)
        finally:
            entrance.forget()

    replace_forward(module, forward)


def _wrap_block(ranks: TensorRanks, block: nn.Module, *, first: bool, last: bool) -> None:
    """Add up the gradients of the block's parameters of which each rank makes a part, and cut the residuals.

    Where residuals are cut, that is every parameter that is whole: it sees this rank's tokens, or this rank's heads, alone.
    """
    inside = {id(module) for module in block.modules()}
    always = [slot for slot in ranks.partial if id(slot[0]) in inside]
    every = [(module, key) for module in block.modules() for key in module._parameters]
    if not always and not ranks.sequence_parallel and ranks.random is None:
        return
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        sequence = ranks.follows_sequence(block)
        if sequence and first:
            args, kwargs = _with_states(args, kwargs, lambda x: _own_tokens(x, ranks))
        with _summed(ranks, every if sequence else always), _own_numbers(ranks, sequence):
            outputs = inner(*args, **kwargs)
        if sequence and last:
            outputs = _with_first(outputs, lambda x: gather_from(x, ranks.group, dim=SEQUENCE, partial=False))
        return outputs

    replace_forward(block, torch.compiler.disable(forward, recursive=False))


@contextmanager
def _own_numbers(ranks: TensorRanks, sequence: bool) -> Iterator[None]:
    """Let dropout draw other numbers on each rank, in a block that works on the rank's own tokens."""
    if ranks.random is not None:
        ranks.random.forget()
        if sequence:
            ranks.random.begin()
    yield
    if ranks.random is not None:
        ranks.random.end()


@contextmanager
def _summed(ranks: TensorRanks, slots: Sequence[Slot]) -> Iterator[None]:
    """Let whole parameters have the sum of the ranks' gradients: one all-reduce for all of them."""
    whole = [(module, key) for module, key in slots if _is_whole(module._parameters[key])]
    parameters = tuple(module._parameters[key] for module, key in whole)
    with standing_in(whole, copy_all_to(parameters, ranks.group)):  # type: ignore[arg-type]
        yield


def _is_whole(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad and not is_cut(parameter)


def _own_tokens(x: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
    """[B, S, D] -> this rank's [B, S/T, D]."""
    if x.shape[SEQUENCE] % ranks.size:
        raise ConfigError([sequence_rule(x.shape[SEQUENCE], ranks.size)])
    return scatter_to(x, ranks.group, dim=SEQUENCE)


def sequence_rule(length: int, size: int) -> str:
    """What is wrong with sequences of `length` tokens on `size` ranks, and the nearest length."""
    nearest = max(round(length / size), 1) * size
    return f"data.seq_len={length}: layout.sequence_parallel cuts it into layout.tp={size} equal parts; nearest: {nearest}"


def _with_states(args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The arguments of a module with its hidden states, the first of them, changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def _with_first(outputs: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A block's outputs with the hidden states, alone or the first of several, changed."""
    if isinstance(outputs, tuple):
        return (change(outputs[0]), *outputs[1:])
    return change(outputs)


def _cut_logits_bias(ranks: TensorRanks, model: nn.Module) -> None:
    """Let a bias that the model itself adds to its logits (BART's, a buffer [1, V]) be cut where they are."""
    heads = [f for m in model.modules() if isinstance(f := vars(m).get("forward"), LogitsForward)]
    if "final_logits_bias" not in model._buffers or not heads:
        return
    head, inner = heads[0], model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if head.whole:
            return inner(*args, **kwargs)
        whole = model._buffers["final_logits_bias"]
        assert whole is not None
        first, last = piece_range(head.width, pieces=ranks.size, index=ranks.rank)
        model._buffers["final_logits_bias"] = as_logits(whole[:, first:last], ranks, head.width)
        try:
            return inner(*args, **kwargs)
        finally:
            model._buffers["final_logits_bias"] = whole

    replace_forward(model, forward)


def _refuse_half_tied(ranks: TensorRanks, model: nn.Module) -> None:
    """A cut parameter is cut wherever it is used.

    A module that registers the parameter of one inside it (BERT's head has its projection's bias) only names it again.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for places in ranks.owners.values():
        cut = [(module, key) for module, key in places if is_cut(module._parameters[key])]
        able = [names[id(module)] for module, key in cut if (id(module), key) in ranks.handled]
        others = [names[id(module)] for module, key in cut if (id(module), key) not in ranks.handled]
        missing = [name for name in others if not any(user.startswith(f"{name}.") for user in able)]
        if missing:
            raise ConfigError(
                [f"tp_plan: {missing[0]} shares a parameter that the plan cuts elsewhere; nearest: give {missing[0]} a style too"]
            )
