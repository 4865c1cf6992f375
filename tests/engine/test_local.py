"""The norm of a gradient does not depend on how it is cut."""

from __future__ import annotations

import pytest
import torch

from distllm.engine.local import squared_norm_of


def test_the_norm_of_a_large_tensor_is_that_of_its_pieces() -> None:
    whole = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    exact = float(whole.double().square().sum())
    for pieces in ([whole], whole.chunk(7), whole.chunk(1000)):
        square = squared_norm_of(pieces)
        assert square.dtype == torch.float32 and abs(float(square) / exact - 1) < 1e-7
    assert squared_norm_of([whole.double()]).dtype == torch.float64


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (4096, 192), (3, 4, 5), (70_000, 2), (2, 70_000)])
def test_the_norm_of_any_shape_and_format(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = tensor.to(dtype)
        exact = float(given.double().square().sum())
        assert float(squared_norm_of([given])) == pytest.approx(exact, rel=2e-7)
