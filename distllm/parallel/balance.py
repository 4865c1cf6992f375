"""The load of experts, and the losses that balance it: added to the gradient where the router is, not to the objective.

transformers' balance loss multiplies two means over a batch, so it changes with the split of the batch. This one is a sum
over samples, each by itself, weighted by its targets as the objective is: any split over ranks and micro-batches gives
the same gradient once the engine has divided by the global count of targets.

A layer adds its own gradient at its router. So it needs no outputs of other layers, which may be on other pipeline
stages, and an activation that is recomputed counts once: the gradient was taken in the forward pass and is kept.

Shapes: B samples, S places, N = B x S, E experts of a layer, K experts a token.

Source: the complementary sequence-wise loss of DeepSeek-AI 2024 (DeepSeek-V3), arXiv 2412.19437, section 2.1.2; the router's
z-loss of Zoph et al. 2022 (ST-MoE), arXiv 2202.08906.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from distllm.config.errors import ConfigError
from distllm.config.schema import MoeConfig
from distllm.data.batch import IGNORE, Batch


def real_tokens(batch: Batch) -> torch.Tensor:
    """The places that are no padding, bool [B, S]."""
    ids, mask = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)


def sample_weights(batch: Batch) -> torch.Tensor:
    """The targets of each sample, [B]: what the objective's count is made of, so that one division suits both."""
    labels = batch.targets["labels"]
    return (labels != IGNORE).flatten(1).sum(1) if labels.dim() > 1 else (labels != IGNORE).long()


@dataclass
class Routed:
    """What the routers did in one forward pass; scalars and counts on the device, of this rank alone."""

    balance: dict[str, torch.Tensor] = field(default_factory=dict)
    """Router -> the balance loss, a sum over samples weighted by their targets; divided by the count of targets it is 1
    where every expert gets the same."""
    z: dict[str, torch.Tensor] = field(default_factory=dict)
    """Router -> the z-loss, the same kind of sum."""
    load: dict[str, torch.Tensor] = field(default_factory=dict)
    """Router -> real tokens that chose each expert, [E]; they add up over ranks and micro-batches."""


@dataclass(frozen=True)
class _Call:
    """What a router needs to know of the forward pass that it is in."""

    real: torch.Tensor
    """[B, S]."""
    tokens: torch.Tensor
    """Real tokens of each whole sample, at least 1, [B]."""
    weights: torch.Tensor
    """[B]."""
    scale: float
    group: dist.ProcessGroup | None
    routed: Routed


class RouterWatch:
    """Hooks on the routers of a model that act only inside `forward_pass`.

    They are put on once, before blocks are compiled, because a compiled module does not see hooks that come later.
    """

    def __init__(self, model: nn.Module, *, experts: Mapping[str, nn.Module], moe: MoeConfig) -> None:
        """Args:
        model: the whole module or a pipeline stage of it, on meta or not.
        experts: its modules of experts by path; the router is what stands beside them.
        moe: the coefficients.

        Raises:
            ConfigError: a loss is asked for, and a layer's router cannot be found.
        """
        self.moe = moe
        self._call: _Call | None = None
        for path in experts:
            parent = path.rpartition(".")[0]
            routers = [(n, m) for n, m in model.get_submodule(parent).named_children() if hasattr(m, "top_k")]
            if len(routers) == 1:
                name, router = routers[0]
                router.register_forward_hook(self._hook(f"{parent}.{name}"))
            elif key := next((key for key in ("balance", "z_loss") if getattr(moe, key)), None):
                raise ConfigError([f"moe.{key}={getattr(moe, key)}: {parent} has no router that can be balanced; nearest: 0"])

    @contextmanager
    def forward_pass(
        self, batch: Batch, *, scale: float = 1.0, group: dist.ProcessGroup | None = None
    ) -> Iterator[Routed]:
        """Watch the forward pass inside; where gradients are on, their backward pass will hold those of the losses.

        Args:
            batch: what the model is given, on the device; on every pipeline stage that of its own micro-batch.
            scale: what the objective's sum is multiplied by before its backward pass (the loss scale of fp16).
            group: the ranks over which each sequence is cut (cp); None where it is whole.

        Yields:
            What the routers did, filled in as they do it.
        """
        assert self._call is None, "a forward pass inside another"
        real, weights = real_tokens(batch), sample_weights(batch)
        totals = torch.stack([real.sum(1), weights])
        if group is not None:  # of the whole sequence, of which this rank has a part
            dist.all_reduce(totals, group=group)
        self._call = _Call(real, totals[0].clamp(min=1), totals[1], scale, group, Routed())
        try:
            yield self._call.routed
        finally:
            self._call = None

    def _hook(self, name: str) -> Callable[..., Any]:
        @torch.compiler.disable
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            # Outside a watched pass, and where a checkpointed block runs again, there is nothing to do.
            return None if self._call is None else self._see(name, output, self._call)

        return hook

    def _see(self, name: str, output: Any, call: _Call) -> Any:
        """Note a router's choices, and let the gradient of its losses enter at its logits."""
        if not (isinstance(output, tuple) and len(output) == 3):  # some families choose their experts elsewhere
            if self.moe.balance or self.moe.z_loss:
                raise ConfigError([f"moe: {name} does not give logits, scores and experts; nearest: moe.balance=0 moe.z_loss=0"])
            return None
        logits, scores, index = output
        # Selective checkpointing counts operators, and would look for these when the block runs again.
        with _disable_current_modes():
            gradient = router_losses(name, logits.detach(), index, call=call, moe=self.moe)
            if gradient is None or not (torch.is_grad_enabled() and scores.requires_grad):
                return None
            return logits, _Enter.apply(scores, logits, gradient), index


@torch.no_grad()
def router_losses(
    name: str, logits: torch.Tensor, index: torch.Tensor, *, call: _Call, moe: MoeConfig
) -> torch.Tensor | None:
    """Add one layer's load and losses to `call.routed`; their gradient at the logits [N, E], None where it is zero.

    With T the real tokens of a sample, f_i = E / (K T) x (tokens that chose expert i) and P_i the mean over its tokens of
    softmax(logits)_i, a sample's balance loss is sum_i f_i P_i; f has no gradient.

    Args:
        name: the router's path.
        logits: [N, E].
        index: int64 [N, K], the experts chosen.
        call: the forward pass.
        moe: the coefficients.
    """
    (samples, places), (tokens, experts) = call.real.shape, logits.shape
    assert tokens == samples * places, f"{name} saw {tokens} tokens of a batch of {samples} x {places}"
    logits32 = (logits if logits.dtype == torch.float64 else logits.float()).view(samples, places, experts)
    real = call.real.unsqueeze(-1).to(logits32.dtype)  # [B, S, 1]
    chosen = torch.zeros_like(logits32).scatter_(-1, index.view(samples, places, -1), 1.0) * real
    load = chosen.sum(1)  # [B, E]
    call.routed.load[name] = load.sum(0)
    if not (moe.balance or moe.z_loss):
        return None
    if call.group is not None:
        dist.all_reduce(load, group=call.group)
    share = (call.weights.to(logits32.dtype) / call.tokens).view(-1, 1, 1)  # [B, 1, 1]
    p = logits32.softmax(-1)
    f = (load * experts / (index.shape[-1] * call.tokens.unsqueeze(1))).unsqueeze(1)  # [B, 1, E]
    fp = (f * p).sum(-1, keepdim=True)  # [B, S, 1]
    z = logits32.logsumexp(-1, keepdim=True)
    call.routed.balance[name] = (share * fp * real).sum()
    call.routed.z[name] = (share * z.square() * real).sum()
    gradient = moe.balance * p * (f - fp) + moe.z_loss * 2 * z * p
    return (gradient * (share * real * call.scale)).view(tokens, experts).to(logits.dtype)


class _Enter(torch.autograd.Function):
    """`scores` as they are; backward, `gradient` enters at the logits, which nothing else may use."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        # No saved tensor: a block that runs again does not come here, and would not save it a second time.
        ctx.gradient = gradient
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], ctx.gradient, None


def load_figures(load: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """How uneven experts are loaded, from counts added up over all ranks and micro-batches.

    Args:
        load: router -> tokens of each expert, [E].

    Returns:
        `moe_load_max`: the busiest expert against the mean of its layer, in the worst layer (1 is even);
        `moe_idle_experts`: experts without a token, over all layers. Empty without routers.
    """
    if not load:
        return {}
    worst = torch.stack([(counts.max() / counts.mean().clamp(min=1e-9)).float() for counts in load.values()]).max()
    idle = torch.stack([(counts == 0).sum() for counts in load.values()]).sum()
    return {"moe_load_max": float(worst), "moe_idle_experts": float(idle)}
