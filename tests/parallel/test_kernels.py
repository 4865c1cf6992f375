"""Attention over parts of the keys adds up to attention over all of them, with each kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distllm.parallel.kernels import CPU_FLASH, CUDA_EFFICIENT, CUDA_FLASH, PLAIN, Kernel, additive, choose_kernel
from tests.parallel.attention import SCALE, by_the_book, problem, rule_named, worst

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kernel", [CPU_FLASH, PLAIN], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", ["causal", "full", "documents"])
def test_kernel_is_torchs_attention(name: str, kernel: Kernel, dtype: torch.dtype) -> None:
    assert worst(_run(kernel, name, dtype, "cpu"), _wanted(name, dtype)) < BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "full", "documents"])
@pytest.mark.parametrize("kernel", [CUDA_FLASH, CUDA_EFFICIENT, PLAIN], ids=lambda kernel: kernel.name)
def test_cuda_kernel_is_torchs_attention(kernel: Kernel, name: str, dtype: torch.dtype) -> None:
    if kernel is CUDA_FLASH and (dtype != torch.bfloat16 or name == "documents"):
        return  # never chosen
    if kernel is CUDA_EFFICIENT and dtype == torch.float64:
        return
    assert worst(_run(kernel, name, dtype, "cuda"), _wanted(name, dtype)) < BOUNDS[dtype]


def _wanted(name: str, dtype: torch.dtype) -> list[np.ndarray]:
    return by_the_book(problem(24, 4, 2, dtype), rule_named(name, 24))


def _run(kernel: Kernel, name: str, dtype: torch.dtype, device: str) -> list[np.ndarray]:
    query, key, value, grad = (tensor.to(device) for tensor in problem(24, 4, 2, dtype))
    mask = None
    if name == "documents":
        visible = rule_named(name, 24).visible(range(24), range(24), device=torch.device("cpu"))
        mask = additive(visible.to(device), dtype=dtype)
    asked = {"causal": name == "causal", "mask": mask, "scale": SCALE}
    out, lse, extra = kernel.forward(query, key, value, **asked)
    gradients = kernel.backward(grad, query, key, value, out, lse, **asked, extra=extra)
    return [tensor.double().cpu().numpy() for tensor in (out, *gradients)]


@pytest.mark.parametrize(("kernel", "masked"), [(CUDA_FLASH, False), (CUDA_EFFICIENT, False), (CUDA_EFFICIENT, True)])
def test_cuda_kernels_are_called_as_torch_declares_them(kernel: Kernel, masked: bool) -> None:
    """Arguments and shapes alone, on meta: what can be checked of them where there is no GPU."""
    query, key, value, grad = (tensor.to("meta") for tensor in problem(24, 4, 2, torch.bfloat16))
    mask = additive(torch.ones(2, 1, 24, 24, dtype=torch.bool), dtype=torch.bfloat16).to("meta") if masked else None
    asked = {"causal": not masked, "mask": mask, "scale": SCALE}
    out, lse, extra = kernel.forward(query, key, value, **asked)
    assert out.shape == query.shape and lse.shape == query.shape[:3] and lse.dtype == torch.float32 and len(extra) == 2
    gradients = kernel.backward(grad, query, key, value, out, lse, **asked, extra=extra)
    assert [g.shape for g in gradients] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize("kernel", [CPU_FLASH, PLAIN], ids=lambda kernel: kernel.name)
def test_a_query_without_keys_gives_nothing(kernel: Kernel) -> None:
    query, key, value, grad = problem(24, 4, 2, torch.float32)
    visible = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
    visible[:, :, 5] = False
    asked = {"causal": False, "mask": additive(visible, dtype=torch.float32), "scale": SCALE}
    out, lse, extra = kernel.forward(query, key, value, **asked)
    assert (out[:, :, 5] == 0).all() and (lse[:, :, 5] == -torch.inf).all() and lse[:, :, 6].isfinite().all()
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    dq, dk, dv = kernel.backward(grad, query, key, value, out, lse, **asked, extra=extra)
    assert (dq[:, :, 5] == 0).all()
    assert dk.isfinite().all() and dv.isfinite().all()


def test_the_kernel_follows_device_dtype_and_width() -> None:
    def chosen(device: str, dtype: torch.dtype, width: int, masked: bool) -> str:
        with torch.device("meta"):
            query = torch.empty(1, 1, 1, width, dtype=dtype)
        return choose_kernel(_On(query, device), masked=masked).name  # type: ignore[arg-type]

    assert chosen("cpu", torch.float64, 7, True) == "cpu flash"
    assert chosen("cuda", torch.bfloat16, 128, False) == "cuda flash"
    assert chosen("cuda", torch.float16, 64, True) == "cuda efficient"
    assert chosen("cuda", torch.float32, 64, False) == "cuda efficient"
    assert chosen("cuda", torch.float64, 64, False) == "plain"
    assert chosen("cuda", torch.bfloat16, 20, False) == "plain"


class _On:
    """A tensor as if on another device."""

    def __init__(self, tensor: torch.Tensor, device: str) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device(device)
