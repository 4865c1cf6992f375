"""Where the parts of a transformers model are, found without knowing its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from distllm.config.errors import ConfigError


@dataclass(frozen=True)
class Places:
    """Module paths of the parts of a language model."""

    blocks: tuple[str, ...]
    embedding: str | None
    norm: str | None
    head: str | None
    base: str | None


def locate(model: Any, *, layers: int | None) -> Places:
    """Find embedding, blocks, last norm, head and body of a transformers model without knowing its family.

    Args:
        model: the model, also on meta.
        layers: how many blocks its config names, to tell the list of blocks from other lists.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if model.config.is_encoder_decoder:
        stacks = [names[id(model.get_encoder())], names[id(model.get_decoder())]]
        blocks = tuple(_blocks(model, under=f"{stack}.", layers=None) for stack in stacks)
    else:
        blocks = (_blocks(model, under="", layers=layers),)
    prefix = model.base_model_prefix
    base = prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else None
    head = model.get_output_embeddings()
    return Places(
        blocks=blocks,
        embedding=names.get(id(model.get_input_embeddings())),
        norm=_last_norm(model, blocks[-1]),
        head=names.get(id(head)) if head is not None else _last_linear_outside(model, base),
        base=base,
    )


def _blocks(model: nn.Module, *, under: str, layers: int | None) -> str:
    """The path of the list of blocks: the one with most parameters of those of the right length, none inside another."""
    every = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [(n, m) for n, m in every if n.startswith(under)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    right = [(n, m) for n, m in outer if len(m) == layers] or outer
    if not right:
        raise ConfigError([f"model: {type(model).__name__} has no list of blocks to shard; use a ModelSpec of your own"])
    return max(right, key=lambda item: sum(p.numel() for p in item[1].parameters()))[0]


def _last_linear_outside(model: nn.Module, base: str | None) -> str | None:
    """The output projection of a classifier: the last linear layer outside the body."""
    if base is None:
        return None
    inside = f"{base}."
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(inside)]
    return linear[-1] if linear else None


def _last_norm(model: nn.Module, blocks: str) -> str | None:
    """The norm beside the list of blocks: the first one registered after it, else (OPT registers it before) the last."""
    parent = blocks.rpartition(".")[0]
    children = list(model.get_submodule(parent).named_children())
    at = [name for name, _ in children].index(blocks.rpartition(".")[2])
    norms = [(i, n) for i, (n, m) in enumerate(children) if "norm" in type(m).__name__.lower() and "emb" not in n]
    after = [n for i, n in norms if i > at] or [n for _, n in norms[-1:]]
    return f"{parent}.{after[0]}".lstrip(".") if after else None


def ep_plan(model: Any) -> dict[str, str]:
    """The expert-parallel plan that transformers carries for a model, by full module names; empty where it has none."""
    base = getattr(model.config, "base_model_ep_plan", None) or {}
    return {f"{model.base_model_prefix}.{name}": style for name, style in base.items()}
