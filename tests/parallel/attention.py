"""Attention by the book, over a whole sequence in one process: what every way of cutting it must equal.

Shapes: B batch, H query heads, K key heads, S sequence, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from distllm.parallel.blocks import Ranges, Rule

BATCH, WIDTH = 2, 8
SCALE = 0.4


def problem(seq_len: int, heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, key, value and the gradient of the output: the same numbers in every process, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seq_len + 100 * heads + kv_heads)
    shapes = [(BATCH, count, seq_len, WIDTH) for count in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def rule_named(name: str, seq_len: int) -> Rule:
    """causal, full, documents (uneven), padding (a row from the left, one at the right), window, or documents under one."""
    rule = Rule(causal=name not in ("full", "padding"), scale=SCALE)
    if "documents" in name:
        begins = torch.zeros(BATCH, seq_len, dtype=torch.bool)
        begins[0, [0, 3, seq_len // 2 + 1]] = True
        begins[1, [0, seq_len // 3]] = True
        at = torch.arange(seq_len, dtype=torch.int32)
        rule = replace(rule, starts=torch.where(begins, at, 0).cummax(1).values.to(torch.int32))
    if "padding" in name:
        seen = torch.ones(BATCH, seq_len, dtype=torch.bool)
        seen[0, : seq_len // 3], seen[1, -5:] = False, False
        rule = replace(rule, seen=seen)
    return replace(rule, window=5) if "window" in name else rule


def by_the_book(given: Sequence[torch.Tensor], rule: Rule) -> list[np.ndarray]:
    """Output and gradients of query, key and value, in fp64, of torch's own attention under a dense mask."""
    query, key, value, grad = (tensor.double() for tensor in given)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    whole = range(query.shape[2])
    mask = rule.visible(whole, whole, device=query.device)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rule.scale, enable_gqa=True)
    return [out.detach().numpy(), *(g.numpy() for g in torch.autograd.grad(out, (query, key, value), grad))]


def held(tensor: torch.Tensor, runs: Ranges) -> torch.Tensor:
    """The tokens of a rank, [B, H, M, D]."""
    return torch.cat([tensor[:, :, run.start : run.stop] for run in runs], 2)


def worst(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """The largest error of any of them, relative to its largest number."""
    return max(float(np.abs(f - w).max() / np.abs(w).max()) for f, w in zip(found, wanted, strict=True))
