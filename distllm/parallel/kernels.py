"""Attention over one part of the keys, with what is needed to put parts together: softmax sums, and gradients under them.

Fused kernels of torch where there is one for the device and the dtype, else plain products. Parts are merged by the
logarithm of the sum of exponentials (lse) of each query, as in FlashAttention (Dao et al. 2022, arXiv 2205.14135).

Shapes: B batch, H query heads, K key heads (H is a multiple of K), M queries, N keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

Part = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]
"""The output [B, H, M, D], the lse [B, H, M] in `wide` of its dtype, and what the backward pass of the kernel also wants."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of attention over a part of the keys."""

    name: str
    forward: Callable[..., Part]
    """(query, key, value, *, causal, mask, scale) -> Part."""
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """(grad, query, key, value, out, lse, *, causal, mask, scale, extra) -> gradients of query, key and value.

    `out` and `lse` are those over all parts, so that each part gives its share of the gradient."""


def choose_kernel(query: torch.Tensor, *, masked: bool) -> Kernel:
    """The fastest kernel for the device, dtype and width of `query` [B, H, M, D].

    Args:
        masked: whether an explicit mask comes with it, which flash attention on CUDA does not take.
    """
    width, half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type == "cpu":
        return CPU_FLASH
    if query.device.type == "cuda" and width % 8 == 0 and query.dtype != torch.float64:
        if half and width <= 256 and not masked:
            return CUDA_FLASH
        return CUDA_EFFICIENT
    return PLAIN


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over parts of tensors of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def additive(visible: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """0 where `visible` (bool [B, 1, M, N]) and -inf elsewhere, in rows padded so that CUDA's kernels can read them."""
    rows = F.pad(visible, (0, -visible.shape[-1] % 16))
    return torch.zeros(rows.shape, dtype=dtype, device=rows.device).masked_fill_(~rows, -torch.inf)[..., : visible.shape[-1]]


def _no_keys(part: Part, mask: torch.Tensor | None) -> Part:
    """Queries that may look at no key of the part get 0 and an lse of -inf, whatever the kernel made of them."""
    out, lse, extra = part
    if mask is None:
        return part
    blind = (mask == -torch.inf).all(-1)
    return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf), extra


def _cpu_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, mask: torch.Tensor | None, scale: float
) -> Part:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return _no_keys((out, lse, ()), mask)


def _cpu_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    *, causal: bool, mask: torch.Tensor | None, scale: float, extra: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )


def _flash_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, mask: torch.Tensor | None, scale: float
) -> Part:
    assert mask is None
    made: Any = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    return made[0], made[1], (made[6], made[7])  # the state of a generator that nobody draws from


def _flash_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    *, causal: bool, mask: torch.Tensor | None, scale: float, extra: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal, *extra,
        scale=scale,
    )  # fmt: skip


def _efficient_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, mask: torch.Tensor | None, scale: float
) -> Part:
    bias = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
    key, value = _repeated(key, query), _repeated(value, query)
    made: Any = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, causal, scale=scale
    )
    return _no_keys((made[0], made[1][..., : query.shape[2]], (made[2], made[3])), mask)


def _efficient_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    *, causal: bool, mask: torch.Tensor | None, scale: float, extra: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    bias = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)  # the kernel reads rows of 32
    many_keys, many_values = _repeated(key, query), _repeated(value, query)
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, query, many_keys, many_values, bias, out, lse, *extra, 0.0, [True, True, True, False], causal, scale=scale
    )
    return dq, _added(dk, key), _added(dv, value)


def _plain_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, mask: torch.Tensor | None, scale: float
) -> Part:
    scores = _scores(query, key, causal=causal, mask=mask, scale=scale)
    lse = torch.logsumexp(scores, -1)
    chance = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return (chance @ _repeated(value, query).to(chance.dtype)).to(query.dtype), lse, ()


def _plain_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    *, causal: bool, mask: torch.Tensor | None, scale: float, extra: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    chance = torch.exp(_scores(query, key, causal=causal, mask=mask, scale=scale) - lse[..., None])
    grad, out = grad.to(chance.dtype), out.to(chance.dtype)
    dchance = grad @ _repeated(value, query).to(chance.dtype).transpose(-1, -2)
    dscores = chance * (dchance - (grad * out).sum(-1, keepdim=True)) * scale
    dq = dscores @ _repeated(key, query).to(chance.dtype)
    dk, dv = dscores.transpose(-1, -2) @ query.to(chance.dtype), chance.transpose(-1, -2) @ grad
    return dq.to(query.dtype), _added(dk, key).to(key.dtype), _added(dv, value).to(value.dtype)


def _scores(
    query: torch.Tensor, key: torch.Tensor, *, causal: bool, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """[B, H, M, N], -inf where a query may not look."""
    dtype = wide(query.dtype)
    scores = query.to(dtype) @ _repeated(key, query).to(dtype).transpose(-1, -2) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores if mask is None else scores + mask.to(dtype)


def _repeated(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, K, N, D] for each of the query's heads, [B, H, N, D]."""
    times = query.shape[1] // keys.shape[1]
    return keys if times == 1 else keys.repeat_interleave(times, 1)


def _added(grad: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The gradient [B, H, N, D] of repeated keys, added up to that of the keys [B, K, N, D]."""
    return grad if grad.shape == keys.shape else grad.unflatten(1, (keys.shape[1], -1)).sum(2)


CPU_FLASH = Kernel("cpu flash", _cpu_forward, _cpu_backward)
CUDA_FLASH = Kernel("cuda flash", _flash_forward, _flash_backward)
CUDA_EFFICIENT = Kernel("cuda efficient", _efficient_forward, _efficient_backward)
PLAIN = Kernel("plain", _plain_forward, _plain_backward)
