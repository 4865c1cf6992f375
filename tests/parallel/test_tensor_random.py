"""Dropout under tensor parallel: the same on all ranks for what all have, another on each for what each has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from distllm.comm import World
from distllm.config.schema import ActivationConfig
from distllm.models.spec import ModelSpec
from distllm.parallel.activation import apply_activation_checkpointing
from distllm.parallel.parallelize import find_blocks
from tests.parallel.tensor_cases import Case, case_of, laid_out, whole
from tests.ranks import on_ranks


class Dropped(TorchFunctionMode):
    """Records where each dropout put zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[np.ndarray] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.dropout:
            with torch._C.DisableTorchFunction():
                kept = function(torch.ones_like(args[0]), *args[1:], **(kwargs or {}))
            self.masks.append((kept == 0).numpy())
            return args[0] * kept
        return function(*args, **(kwargs or {}))


def run(case: Case, world: World, *, sequence: bool, recompute: bool) -> tuple[list[np.ndarray], dict[str, np.ndarray], float]:
    """The masks of a forward pass, the gradients, and a number drawn afterwards."""

    def prepare(model: nn.Module) -> None:
        model.config._attn_implementation = "eager"  # type: ignore[union-attr]  # its dropout is seen from outside
        if recompute:
            config = ActivationConfig(mode="selective" if sequence else "full")
            apply_activation_checkpointing(find_blocks(model, spec=spec), config)

    spec: ModelSpec = case.spec
    model, packed, _ = laid_out(case, world, tp=world.size, sequence=sequence, prepare=prepare)
    torch.manual_seed(3)
    batch = case.batches[0]
    with Dropped() as dropped:
        terms = case.objective(model.train()(**batch.inputs), batch)
    masks = dropped.masks[:]
    with dropped:
        terms.sum.backward()
    gradients = {n: whole(p.grad, packed.get(n)).numpy() for n, p in model.named_parameters() if p.grad is not None}
    return masks, gradients, float(torch.rand(()))


@pytest.mark.parametrize("sequence", [False, True])
def test_heads_drop_for_themselves_and_residuals_together(sequence: bool, tmp_path: Path) -> None:
    case = case_of("gpt2", dropout=0.3)
    ranks = on_ranks(lambda world: run(case, world, sequence=sequence, recompute=False), 2, tmp_path)
    kinds = {"heads": 0, "residuals": 0}
    for one, other in zip(ranks[0][0], ranks[1][0], strict=True):
        share = float((one == other).mean())
        if one.ndim == 4:  # [B, H/T, S, S]
            kinds["heads"] += 1
            assert 0.4 < share < 0.8  # 0.3^2 + 0.7^2 where they are independent
        elif one.shape[1] == 16:  # [B, S, D]: of embeddings, or of residuals that are whole
            assert share == 1.0
            kinds["residuals"] += 1
        else:
            assert 0.4 < share < 0.8
            kinds["residuals"] += 1
    assert kinds == {"heads": 2, "residuals": 1 + 2 * 2}
    for name, gradient in ranks[0][1].items():
        np.testing.assert_array_equal(gradient, ranks[1][1][name], err_msg=name)
    assert ranks[0][2] == ranks[1][2]  # the common stream goes on as one


@pytest.mark.parametrize("sequence", [False, True])
def test_recomputation_drops_the_same(sequence: bool, tmp_path: Path) -> None:
    case = case_of("gpt2", dropout=0.3)

    def rank(world: World) -> Any:
        return [run(case, world, sequence=sequence, recompute=recompute)[1:] for recompute in (False, True)]

    for (plain, number), (again, other) in on_ranks(rank, 2, tmp_path):
        assert number == other
        for name, gradient in plain.items():
            np.testing.assert_array_equal(gradient, again[name], err_msg=name)
