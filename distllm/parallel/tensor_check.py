"""What tensor parallelism cannot do with a model, told before anything is cut; needs no ranks.

T is the number of tp ranks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from itertools import count

from torch import nn

from distllm.models.spec import ModelSpec
from distllm.parallel.tensor import all_cut, planned, readers
from distllm.parallel.tensor_heads import heads_of
from distllm.parallel.tensor_params import piece_range
from distllm.parallel.tensor_styles import PARAMETER_STYLES, STYLES, fits, output_width, parts_of


def tp_problems(model: nn.Module, *, spec: ModelSpec, size: int) -> list[str]:
    """Why a model cannot be cut over `size` ranks, a line each with the nearest value that works; empty: it can.

    Args:
        model: the whole model, on any device, before a pipeline cuts it.
        spec: its `tp_plan`.
        size: T.
    """
    if size == 1:
        return []
    if not spec.tp_plan:
        rule = f"{spec.name} has no tensor-parallel plan (ModelSpec.tp_plan)"
        return [f"layout.tp={size}: {rule}; nearest: layout.tp=1"]
    found, unmatched = planned(model, spec.tp_plan)
    problems = [_no_match(pattern, model) for pattern in unmatched]
    problems += _style_problems(model, found)
    if problems:
        return problems
    rules = list(_size_problems(model, found, size))
    if not rules:
        return []
    nearest = min((n for n in range(1, size) if not any(_size_problems(model, found, n))), key=lambda n: size - n)
    more = next((n for n in range(size + 1, 2 * size - nearest) if not any(_size_problems(model, found, n))), None)
    return [f"layout.tp={size}: {rules[0]}; nearest: layout.tp={nearest if more is None else more}"]


def can_cut_sequence(model: nn.Module, *, spec: ModelSpec) -> bool:
    """Whether the residuals of a model can be cut along the sequence.

    That takes one list of blocks, samples of one length, and attentions and MLPs that are modules of their own, of which
    the plan names every layer. Where it is not so, tensor parallelism keeps whole residuals.

    Args:
        model: the whole model, on any device.
        spec: its `tp_plan`, and `task`, which decides whether samples have one length.
    """
    if len(spec.blocks) != 1 or spec.task not in ("", "causal_lm", "sft"):
        return False
    found, _ = planned(model, spec.tp_plan)
    inside = re.compile(rf"{re.escape(spec.blocks[0])}\.[^.]+\.")  # of a block, and not the block itself
    owners = readers(found, head=spec.head)
    return bool(owners) and all(inside.match(o) and all_cut(model.get_submodule(o), o, found) for o in owners)


def narrowest(size: int) -> int:
    """The smallest width that any number of ranks up to `size` can cut, none of them getting nothing."""
    ranks = range(1, size + 1)
    return next(w for w in count(size) if all(piece_range(w, pieces=n, index=n - 1)[0] < w for n in ranks))


def _no_match(pattern: str, model: nn.Module) -> str:
    names = [name for name, _ in model.named_modules() if name]
    close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
    hint = f"; nearest: {close[0]}" if close else ""
    return f"tp_plan: {pattern}: matches no module or parameter of the model{hint}"


def _style_problems(model: nn.Module, found: Mapping[str, str]) -> Iterator[str]:
    """Words that are no styles, and styles of layers that they do not fit."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, style in found.items():
        known = STYLES if name in modules else PARAMETER_STYLES
        if style not in known:
            close = difflib.get_close_matches(style, list(known), n=1, cutoff=0.0)
            yield f"tp_plan: {name}={style}: is no style of a {'layer' if name in modules else 'parameter'}; nearest: {close[0]}"
            continue
        module = modules.get(name)
        kind = type(module).__name__
        if module is None:
            continue
        if not fits(module, style):
            what = "an embedding" if "embedding" in style else "a linear layer"
            yield f"tp_plan: {name}={style}: is a {kind} and not {what}; nearest: replicate"


def _size_problems(model: nn.Module, found: Mapping[str, str], size: int) -> Iterator[str]:
    """Rules that T ranks would break."""
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: set[str] = set()
    for name, style in found.items():
        owner, _, key = name.rpartition(".")
        if name not in modules:
            dim, parts = PARAMETER_STYLES[style]
            parameter = modules[owner]._parameters[key]
            assert parameter is not None
            yield from _width_problem(name, parameter.shape[dim], parts=parts, size=size, even=True)
            continue
        heads = heads_of(modules[owner]) if style in ("colwise", "qkv_colwise") else None
        if heads is not None and not heads.legal(size) and owner not in seen:
            seen.add(owner)
            what = f"{heads.query} attention heads"
            what += f" and {heads.key} of keys and values" if heads.key != heads.query else ""
            yield f"{owner} has {what}, which {size} ranks cannot share evenly"
        elif style == "embedding_rowwise":
            yield from _width_problem(name, modules[name].num_embeddings, parts=1, size=size, even=False)
        elif "colwise" in style and (heads is None or parts_of(style) > 1):
            width, parts = output_width(modules[name]), parts_of(style)
            yield from _width_problem(name, width, parts=parts, size=size, even=parts > 1)


def _width_problem(name: str, width: int, *, parts: int, size: int, even: bool) -> Iterator[str]:
    """A width that cannot be cut: in equal pieces, or in pieces of which none is empty."""
    if even and width % (parts * size):
        yield f"{name} has {width // parts} features, which {size} does not divide"
    elif width % parts == 0 and piece_range(width // parts, pieces=size, index=size - 1)[0] >= width // parts:
        yield f"{name} has {width} features, too few for {size} ranks"
