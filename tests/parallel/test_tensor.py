"""Tensor parallel gives one process's losses and gradients, for every family, with what the formulas say on the wire."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distllm.comm import World
from tests.parallel.tensor_cases import DECODERS, OTHERS, Answer, assert_close, case_of, parallel_answer, reference
from tests.ranks import on_ranks

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [*DECODERS, *OTHERS])
def test_every_family_computes_what_one_process_does(kind: str, size: int, tmp_path: Path) -> None:
    """With residuals whole and, for decoders, cut along the sequence."""
    plain = case_of(kind)
    cases = {dtype: plain.to(dtype) for dtype in BOUNDS}
    ways = [False, True] if kind in DECODERS else [False]

    def rank(world: World) -> dict[torch.dtype, list[Answer]]:
        return {d: [parallel_answer(case, world, tp=size, sequence=way) for way in ways] for d, case in cases.items()}

    wanted = on_ranks(lambda world: {d: reference(case) for d, case in cases.items()}, 1, tmp_path)[0]
    for found in on_ranks(rank, size, tmp_path):
        for dtype, bound in BOUNDS.items():
            for answer in found[dtype]:
                assert_close(answer, wanted[dtype], bound=bound)
