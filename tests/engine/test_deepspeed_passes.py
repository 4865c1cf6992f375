"""How targets are counted under DeepSpeed, with a stand-in for its engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from distllm.data.batch import Batch
from distllm.engine.base import LossTerms
from distllm.engine.deepspeed_passes import WholeModel


class StandIn:
    """What of DeepSpeed's engine a pass through the whole model uses."""

    def __call__(self, **inputs: torch.Tensor) -> None: ...

    def train(self) -> None: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None: ...


def test_more_targets_than_fp32_can_count_are_counted() -> None:
    def objective(outputs: Any, batch: Batch) -> LossTerms:
        return LossTerms(torch.ones(()), torch.tensor(2**24 + 1))

    mesh: Any = SimpleNamespace(loss_group=None)
    passes = WholeModel(StandIn(), mesh, device=torch.device("cpu"))
    total = passes.train([Batch({}, {}, ())] * 2, objective, scale=1.0)
    assert total.tolist() == [2.0, 2 * (2**24 + 1)]
