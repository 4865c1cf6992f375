"""Expert parallelism: experts spread over ranks, tokens sent to where their experts are, and back.

Dropless: every token reaches every expert that its router chose, however uneven that is. The rows that a rank sends and
receives are therefore counted anew at every call, and the host waits once a layer to read those counts.

Shapes: N tokens of this rank, K experts a token, E experts of a layer, P ranks on ep, L = E / P experts of this rank,
R rows that reach this rank, H hidden, I inside an expert.

Bytes that a rank sends a layer and micro-batch: N x K x H x e to the experts and as much back, and the same again in
backward, of which the share for this rank's own experts stays; and 8 x E for the counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from distllm.config.check_expert import balance_problems, expert_problems
from distllm.config.errors import ConfigError
from distllm.config.schema import MoeConfig
from distllm.parallel.mesh import Mesh

STYLE = "ep_dispatch_experts"
"""What transformers' expert plans call a module of experts."""


def expert_modules(model: nn.Module, *, plan: Mapping[str, str]) -> dict[str, nn.Module]:
    """The modules that hold the experts of a layer, by path in the model's order; none in a dense model.

    Args:
        model: the whole module, or a pipeline stage of it.
        plan: module pattern, `*` for a number, to style in transformers' words.
    """
    patterns = {pattern for pattern, style in plan.items() if style == STYLE}
    return {name: module for name, module in model.named_modules() if re.sub(r"\.\d+(?=\.|$)", ".*", name) in patterns}


def check_experts(model: nn.Module, *, plan: Mapping[str, str], ep: int, tp: int = 1, moe: MoeConfig) -> None:
    """Refuse what cannot be done with the experts of a whole model; call it before the model is cut into stages.

    Args:
        model: the whole module, on meta or not.
        plan: as for `expert_modules`.
        ep: expert-parallel ranks.
        tp: tensor-parallel ranks.
        moe: the losses of routers.

    Raises:
        ConfigError: no experts, a number of them that `ep` does not divide, or experts of another form.
    """
    modules, family = expert_modules(model, plan=plan), type(model).__name__
    if problems := list(balance_problems(moe, has_experts=bool(modules), family=family)):
        raise ConfigError(problems)
    if ep == 1:
        return
    counts: set[int | None] = {_count(module) for module in modules.values()}
    problems = [line for count in counts or {None} for line in expert_problems(count, ep=ep, tp=tp, family=family)]
    problems += [
        f"layout.ep={ep}: {name} is {what}, and only gated experts with gate_up_proj [E, 2I, H] and down_proj [E, H, I] can "
        f"be spread; nearest: 1"
        for name, module in list(modules.items())[:1]
        if (what := _unlike(module))
    ]
    if problems:
        raise ConfigError(problems)


def apply_ep(model: nn.Module, mesh: Mesh, *, plan: Mapping[str, str], even: bool = False) -> nn.Module:
    """Spread the experts of every layer over ep, in place; nothing on an axis of size 1 and in layers without experts.

    An expert's gradient on its owner then holds the contributions of the tokens of all ep ranks.

    Args:
        model: the whole module or a pipeline stage of it, on meta or not, that `check_experts` has passed.
        mesh: the ranks by axis.
        plan: as for `expert_modules`.
        even: for a dry run, where no other ranks answer: every expert gets the same, whatever the routers choose, so
            that shapes are known and values mean nothing.

    Returns:
        `model`; the experts' parameters are DTensors, Shard(0) on ep, under the same names.

    Source: Lepikhin et al. 2020 (GShard), arXiv 2006.16668; dropless as in Gale et al. 2022, arXiv 2211.15841.
    """
    group, submesh = mesh.group("ep"), mesh.submesh("ep")
    if group is None:
        return model
    place, ranks = mesh.coordinates()["ep"], mesh.sizes["ep"]
    for module in expert_modules(model, plan=plan).values():
        assert _unlike(module) is None and _count(module) % ranks == 0, "check_experts has not passed this model"
        for name in ("gate_up_proj", "down_proj"):
            whole = getattr(module, name)
            own = whole.detach().chunk(ranks)[place].clone()
            spread = DTensor.from_local(own, submesh, [Shard(0)], run_check=False)
            setattr(module, name, nn.Parameter(spread, requires_grad=whole.requires_grad))
        # The instance's forward shadows the class's, so that no wrapper module changes a name.
        module.forward = partial(_spread_forward, module, group=group, even=even)
    return model


def _count(module: nn.Module) -> int:
    return next(module.parameters()).shape[0]


def _unlike(module: nn.Module) -> str | None:
    """What about a module of experts differs from the form that is computed here; None where nothing does."""
    names = {name for name, _ in module.named_parameters()}
    if names != {"gate_up_proj", "down_proj"}:
        return f"a {type(module).__name__} with parameters {', '.join(sorted(names))}"
    for flag, usual in (("has_gate", True), ("is_concatenated", True), ("is_transposed", False), ("has_post_expert_norm", False)):
        if getattr(module, flag, usual) is not usual:
            return f"a {type(module).__name__} with {flag}={not usual}"
    return None


@torch.compiler.disable
def _spread_forward(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *,
    group: dist.ProcessGroup, even: bool,
) -> torch.Tensor:  # fmt: skip
    """The forward of a module of experts, of which this rank holds its own.

    Args:
        module: the experts.
        hidden: [N, H].
        top_k_index: int64 [N, K], the experts of each token.
        top_k_weights: [N, K], their weights.
        group: the ranks of ep.
        even: as for `apply_ep`.

    Returns:
        [N, H].
    """
    tokens, choices = top_k_index.shape
    # The gradient of a spread parameter is this rank's own: nothing is left to add up over ep.
    gate_up, down = (p.to_local(grad_placements=[Shard(0)]) for p in (module.gate_up_proj, module.down_proj))
    find_route = _even_route if even else _route
    route = find_route(top_k_index, experts=module.gate_up_proj.shape[0], group=group)
    rows = _Spread.apply(hidden, route.order, route.inverse, choices)  # [N * K, H], by expert
    rows = _Exchange.apply(rows, route.received, route.sent, group.group_name)  # [R, H], by rank, then expert
    rows = _Permute.apply(rows, route.by_expert, route.by_rank)
    rows = grouped_linear(rows, gate_up, counts=route.counts, ends=route.ends)  # [R, 2 I]
    rows = grouped_linear(_gate(module, rows), down, counts=route.counts, ends=route.ends)  # [R, H]
    rows = _Permute.apply(rows, route.by_rank, route.by_expert)
    rows = _Exchange.apply(rows, route.sent, route.received, group.group_name)
    rows = _Permute.apply(rows, route.inverse, route.order).view(tokens, choices, -1)
    return (rows * top_k_weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


def _gate(module: Any, rows: torch.Tensor) -> torch.Tensor:
    """[R, 2 I] -> [R, I], by the family's own rule where it has one."""
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(rows)
    gate, up = rows.chunk(2, dim=-1)
    return module.act_fn(gate) * up


@dataclass(frozen=True)
class _Route:
    """Where the rows of one call go."""

    order: torch.Tensor
    """[N * K]: the (token, choice) of each row, by expert."""
    inverse: torch.Tensor
    """[N * K]: the row of each (token, choice)."""
    sent: list[int]
    """[P]: rows for each rank."""
    received: list[int]
    """[P]: rows from each rank; they add up to R."""
    by_expert: torch.Tensor
    """[R]: what came, by rank and then expert, in the order of this rank's experts."""
    by_rank: torch.Tensor
    """[R]: the inverse of it."""
    counts: list[int]
    """[L]: rows of each of this rank's experts."""
    ends: torch.Tensor
    """int32 [L]: the same, added up, on the device."""


@torch.no_grad()
def _route(top_k_index: torch.Tensor, *, experts: int, group: dist.ProcessGroup) -> _Route:
    """Tell the other ranks how many rows each of their experts gets, and hear it from them."""
    ranks, device = dist.get_world_size(group), top_k_index.device
    sorted_index, order = top_k_index.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_index, torch.arange(experts, device=device), right=True)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))  # [E]; unlike bincount, it makes no host wait
    even = [experts // ranks] * ranks
    coming = _exchange(counts, received=even, sent=even, group=group.group_name).view(ranks, -1)  # [P, L]
    own = coming.sum(0)
    lists = torch.cat([counts.view(ranks, -1).sum(1), coming.sum(1), own]).tolist()  # here the host waits
    sent, received = lists[:ranks], lists[ranks : 2 * ranks]
    local = torch.arange(experts // ranks, device=device).repeat(ranks)
    expert_of = local.repeat_interleave(coming.flatten(), output_size=sum(received))
    by_expert = expert_of.argsort(stable=True)
    return _Route(
        order=order, inverse=_inverse(order), sent=sent, received=received, by_expert=by_expert,
        by_rank=_inverse(by_expert), counts=lists[2 * ranks :], ends=own.cumsum(0).to(torch.int32),
    )  # fmt: skip


@torch.no_grad()
def _even_route(top_k_index: torch.Tensor, *, experts: int, group: dist.ProcessGroup) -> _Route:
    """A route of which every rank knows all without asking: rows are dealt out to the experts in turn."""
    ranks, own, device = dist.get_world_size(group), experts // dist.get_world_size(group), top_k_index.device
    rows, place = top_k_index.numel(), dist.get_rank(group) * own
    given = [rows // experts + (expert < rows % experts) for expert in range(experts)]
    counts = [ranks * given[expert] for expert in range(place, place + own)]
    order, by_expert = torch.arange(rows, device=device), torch.arange(sum(counts), device=device)
    return _Route(
        order=order, inverse=order, sent=[sum(given[r * own : (r + 1) * own]) for r in range(ranks)],
        received=[sum(counts) // ranks] * ranks, by_expert=by_expert, by_rank=by_expert, counts=counts,
        ends=torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device),
    )  # fmt: skip


def _inverse(order: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def _exchange(rows: torch.Tensor, *, received: list[int], sent: list[int], group: str) -> torch.Tensor:
    """All-to-all on ep: the first `sent[0]` rows go to its rank 0, and so on.

    As a functional operator, which selective activation checkpointing can keep.
    """
    coming = torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), received, sent, group)
    return torch.ops._c10d_functional.wait_tensor(coming)


class _Exchange(torch.autograd.Function):
    """`_exchange`, whose gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, received: list[int], sent: list[int], group: str) -> torch.Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchange(rows, received=received, sent=sent, group=group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _exchange(gradients[0], received=ctx.sent, sent=ctx.received, group=ctx.group), None, None, None


class _Spread(torch.autograd.Function):
    """Row i of the result is token `order[i] // choices`; its gradient is a sum over choices in a fixed order."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, choices: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)  # not as an attribute: checkpointing frees it
        ctx.choices = choices
        return tokens[order // choices]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (inverse,), (gradient,) = ctx.saved_tensors, gradients
        return gradient[inverse].view(-1, ctx.choices, gradient.shape[-1]).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """`rows[order]`, whose gradient is a permutation too, where torch would scatter and add."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0][ctx.saved_tensors[0]], None, None


def grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, *, counts: list[int], ends: torch.Tensor
) -> torch.Tensor:
    """One linear layer an expert, on the rows of each.

    Args:
        rows: [R, in], expert after expert.
        weight: [L, out, in].
        counts: rows of each expert, on the host; any may be 0, and all.
        ends: int32 [L], the counts added up, on the device.

    Returns:
        [R, out]; the gradient of an expert without rows is zero, not missing.
    """
    rows = rows.to(weight.dtype)
    if sum(counts) and _has_kernel(weight):
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    return _GroupedLinear.apply(rows, weight, counts)


def _has_kernel(weight: torch.Tensor) -> bool:
    """Whether torch's grouped product takes this weight: never fp64, and rows of 16 bytes or a multiple."""
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if weight.device.type == "cuda":
        return aligned and weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    return aligned and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)


class _GroupedLinear(torch.autograd.Function):
    """The grouped product as a loop, exact in every dtype."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        parts = [part @ matrix.T for part, matrix in zip(rows.split(counts), weight, strict=True) if len(part)]
        return torch.cat(parts) if parts else rows.new_empty(0, weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        to_rows, to_weight = torch.empty_like(rows), torch.zeros_like(weight)
        pieces = (t.split(ctx.counts) for t in (rows, gradients[0], to_rows))
        for expert, (part, gradient, target) in enumerate(zip(*pieces, strict=True)):
            if len(part):
                torch.mm(gradient, weight[expert], out=target)
                torch.mm(gradient.T, part, out=to_weight[expert])
        return to_rows, to_weight, None
