"""Tensor parallel gives one process's losses and gradients, for every family, with what the formulas say on the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distllm.comm import World
from tests.parallel.tensor_cases import (
    DECODERS,
    OTHERS,
    Answer,
    assert_close,
    case_of,
    laid_out,
    parallel_answer,
    reference,
    whole,
)
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


@pytest.mark.parametrize(("kind", "sequence"), [("llama", True), ("gpt2", True), ("mixtral", True), ("t5", False)])
def test_together_with_sharding(kind: str, sequence: bool, tmp_path: Path) -> None:
    """2 x 2 and, replicated too, 2 x 1 x 2: gradients are added over the ranks that read other samples."""
    sizes = {"vocab_size": 303, "tie_word_embeddings": kind != "mixtral"} if kind in DECODERS else {}
    case = case_of(kind, **sizes).to(torch.float64)

    def rank(world: World) -> list[Answer]:
        return [
            parallel_answer(case, world, tp=2, shard=shard, replicate=2 // shard, sequence=sequence) for shard in (2, 1)
        ]

    wanted = on_ranks(lambda world: reference(case), 1, tmp_path)[0]
    for number, answers in enumerate(on_ranks(rank, 4, tmp_path)):
        for answer in answers:
            assert_close(answer, wanted, bound=1e-12, losses=[wanted.losses[number // 2]])


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_bf16_by_autocast_and_by_sharding(kind: str, tmp_path: Path) -> None:
    case = case_of(kind)

    def rank(world: World) -> list[Answer]:
        ways: list[dict[str, Any]] = [{"tp": 4, "autocast": True}, {"tp": 2, "shard": 2, "compute": torch.bfloat16}]
        return [parallel_answer(case, world, sequence=True, **way) for way in ways]

    wanted = on_ranks(lambda world: reference(case), 1, tmp_path)[0]
    for number, answers in enumerate(on_ranks(rank, 4, tmp_path)):
        for answer, losses in zip(answers, (wanted.losses, [wanted.losses[number // 2]]), strict=True):
            np.testing.assert_allclose(answer.losses, losses, rtol=1e-3)
            for name, gradient in wanted.gradients.items():
                error = np.linalg.norm(answer.gradients[name] - gradient) / np.linalg.norm(gradient)
                assert error < 3e-2 or np.abs(gradient).max() < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_pieces_stand_where_their_chunks_say(kind: str, tmp_path: Path) -> None:
    """Of an uneven vocabulary too, cut over tp and sharded after it: put together, they are the whole tensors."""
    case = case_of(kind, vocab_size=303)

    def rank(world: World) -> dict[str, bool]:
        model, packed, _ = laid_out(case, world, tp=2, shard=2)
        equal = {}
        for name, p in model.named_parameters():
            equal[name] = torch.equal(whole(p.detach(), packed.get(name)), case.tensors[name])
        return equal

    for found in on_ranks(rank, 4, tmp_path):
        assert all(found.values()), [name for name, good in found.items() if not good]
