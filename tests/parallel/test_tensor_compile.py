"""Compiled blocks right after a vocabulary-parallel embedding, sharded too, give eager's gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch._dynamo
from torch import nn

from distllm.comm import World
from distllm.parallel.parallelize import find_blocks
from tests.parallel.tensor_cases import assert_close, case_of, parallel_answer, reference
from tests.ranks import on_ranks


@pytest.mark.filterwarnings("ignore")  # those of the compiler about torch itself
@pytest.mark.parametrize(("shard", "sequence"), [(1, False), (2, True)])
def test_compiled_blocks(shard: int, sequence: bool, tmp_path: Path) -> None:
    case = case_of("llama", tie_word_embeddings=True)

    def compiled(world: World) -> Any:
        torch._dynamo.utils.counters.clear()

        def prepare(model: nn.Module) -> None:
            blocks = find_blocks(model, spec=case.spec)
            for block in blocks:
                block.compile(backend="aot_eager")

        answer = parallel_answer(case, world, tp=2, shard=shard, sequence=sequence, prepare=prepare)
        return answer, int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    wanted = on_ranks(lambda world: reference(case), 1, tmp_path)[0]
    for number, (answer, graphs) in enumerate(on_ranks(compiled, 2 * shard, tmp_path, timeout_s=110)):
        losses = wanted.losses if shard == 1 else [wanted.losses[number // 2]]
        assert_close(answer, wanted, bound=2e-6, losses=losses)
        assert graphs > 0, "nothing was compiled"
