"""Optimizers over local parameters, and which of them decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from distllm.config.schema import OptimConfig
from distllm.engine.local import LocalParameters


def decaying_names(model: nn.Module, *, embeddings: bool) -> frozenset[str]:
    """The names of the parameters that decay: matrices of linear maps, never biases, norms and (unless asked) embeddings.

    Args:
        model: unwrapped; a weight tied to an embedding counts as the embedding.
        embeddings: whether embeddings decay too.
    """
    excluded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and not embeddings
        for parameter in module.parameters(recurse=False)
    }
    return frozenset(n for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in excluded)


def make_optimizer(
    config: OptimConfig, *, model: nn.Module, device: torch.device, scales: Mapping[str, float] | None = None
) -> Callable[[LocalParameters], torch.optim.Optimizer]:
    """A function that makes the configured optimizer of the local parameters.

    Args:
        config: name and numbers. `weight_decay` is decoupled in adamw and lion (Loshchilov & Hutter 2017,
            arXiv 1711.05101), and an L2 term of the gradient in adam, sgd and rmsprop, as torch has it.
        model: names the parameters that decay.
        device: where they lie; decides between fused and foreach.
        scales: what the learning rate of each parameter is multiplied by, by name; None: 1. A group has it as `lr_scale`.
    """
    decays = decaying_names(model, embeddings=config.decay_embeddings)

    def build(parameters: LocalParameters) -> torch.optim.Optimizer:
        groups: dict[tuple[bool, float], list[torch.Tensor]] = {}
        for name, local in parameters.local.items():  # the trainable ones
            scale = 1.0 if scales is None else scales[name]
            groups.setdefault((name in decays, scale), []).append(local)
        options: list[dict[str, Any]] = [
            {"params": params, "weight_decay": config.weight_decay if decay else 0.0, "lr_scale": scale}
            for (decay, scale), params in groups.items()
        ]
        return _optimizer(config, options, device)

    return build


def _optimizer(config: OptimConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    can_fuse = config.name in {"adamw", "adam", "sgd"} and device.type in {"cpu", "cuda"}
    how = config.implementation
    fused = can_fuse and how in {"auto", "fused"}
    kernels: dict[str, Any] = {"fused": True} if fused else {"foreach": how != "loop"}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, **kernels)
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, **kernels)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, **kernels)
    if config.name == "rmsprop":
        return torch.optim.RMSprop(
            groups, lr=config.lr, alpha=config.alpha, eps=config.eps, momentum=config.momentum, **kernels
        )
    assert config.name == "lion", config.name
    return Lion(groups, lr=config.lr, betas=config.betas)


class Lion(torch.optim.Optimizer):
    """EvoLved sign momentum: one buffer, an update of +-lr (Chen et al. 2023, arXiv 2302.06675)."""

    def __init__(
        self, params: Iterable[Any], *, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """p -= lr * (sign(b1 m + (1 - b1) g) + wd p);  m = b2 m + (1 - b2) g."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            gradients = [p.grad for p in parameters]
            averages = [self.state[p]["exp_avg"] for p in parameters]
            (b1, b2), lr = group["betas"], group["lr"]
            direction = torch._foreach_lerp(averages, gradients, 1.0 - b1)
            torch._foreach_sign_(direction)
            torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, direction, alpha=-lr)
            torch._foreach_lerp_(averages, gradients, 1.0 - b2)


def make_penalty(config: OptimConfig, *, model: nn.Module) -> Callable[[LocalParameters], None] | None:
    """A function that adds the gradients of the L1 and L2 terms of decaying parameters; None when both are 0."""
    if config.l1 == 0.0 and config.l2 == 0.0:
        return None
    decays = decaying_names(model, embeddings=config.decay_embeddings)

    @torch.no_grad()
    def add(parameters: LocalParameters) -> None:
        for name, local in parameters.local.items():
            if name in decays and local.grad is not None:
                local.grad.add_(local, alpha=config.l2)
                local.grad.add_(local.sign(), alpha=config.l1)

    return add
