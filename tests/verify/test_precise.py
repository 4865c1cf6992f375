"""Nothing falls to fp32 inside the mode, in models that ask for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from distllm.verify.precise import InFp64
from tests.models.families import filled, random_ids, spec_of


def test_casts_to_fp32_go_to_fp64() -> None:
    x = torch.ones(2, dtype=torch.float64)
    with InFp64():
        assert x.float().dtype == x.to(torch.float32).dtype == x.to(dtype=torch.float32).dtype == torch.float64
        assert F.softmax(x, -1, dtype=torch.float32).dtype == torch.zeros(1).dtype == torch.float64
        assert torch.arange(3).float().dtype == torch.float64
    assert x.float().dtype == torch.zeros(1).dtype == torch.float32


def test_a_llama_computes_in_fp64_throughout() -> None:
    model, ids = filled(spec_of("llama")).double(), random_ids(2, 8)
    with InFp64(), torch.no_grad():
        once = model(input_ids=ids).logits
        noisy = [p for p in model.parameters() if p.dim() == 2][3]
        noisy += 1e-12 * torch.randn_like(noisy)
        again = model(input_ids=ids).logits
    assert once.dtype == torch.float64
    assert 0 < (once - again).abs().max() < 1e-9  # fp32 would swallow it, or turn it into 1e-7


def test_the_grouped_product_of_experts() -> None:
    rows, weights = torch.randn(7, 4, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    rows.requires_grad_(True)
    with InFp64():
        out = F.grouped_mm(rows, weights, offs=ends)
    assert out.shape == (7, 5) and torch.equal(out[:2], rows[:2] @ weights[0])
    assert torch.equal(out[2:6], rows[2:6] @ weights[2]) and not out[6:].any()
    out.sum().backward()
    assert rows.grad is not None and not rows.grad[6:].any()


def test_a_mixture_runs_in_fp64() -> None:
    model = filled(spec_of("mixtral")).double()
    with InFp64():
        logits = model(input_ids=random_ids(2, 8)).logits
    assert logits.dtype == torch.float64 and isinstance(model, nn.Module)
