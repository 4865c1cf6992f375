"""The norm of a gradient does not depend on how it is cut."""

from __future__ import annotations

import torch

from distllm.engine.local import squared_norm_of


def test_the_norm_of_a_large_tensor_is_that_of_its_pieces() -> None:
    whole = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    exact = float(whole.double().square().sum())
    for pieces in ([whole], whole.chunk(7), whole.chunk(1000)):
        square = squared_norm_of(pieces)
        assert square.dtype == torch.float32 and abs(float(square) / exact - 1) < 1e-7
    assert squared_norm_of([whole.double()]).dtype == torch.float64
