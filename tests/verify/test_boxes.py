"""Pieces of uneven tensors that two axes cut on one dim: every number is in one box, and the box holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from distllm.comm import World
from distllm.parallel.mesh import AXES, build_mesh
from distllm.parallel.packing import Packing
from distllm.parallel.parallelize import Parallel
from distllm.verify.boxes import boxes
from tests.ranks import on_ranks


@pytest.mark.parametrize(("rows", "parts"), [(11, 1), (257, 1), (3, 1), (12, 3)])
def test_every_number_is_in_one_box(rows: int, parts: int, tmp_path: Path) -> None:
    whole = torch.arange(rows * 2, dtype=torch.float64).view(rows, 2)
    packing = Packing(0, parts, 2)

    def rank(world: World) -> Any:
        mesh = build_mesh(world, sizes=dict.fromkeys(AXES, 1) | {"dp_shard": 2, "tp": 2})
        tensor_ranks, place = mesh.submesh("tp"), mesh.coordinates()["tp"]
        order = [i for at, start, length in packing.boxes(0, rows, whole=rows) for i in range(start, start + length)]
        mine = (whole if parts == 1 else whole[order]).chunk(2)[place].clone()
        module = nn.Linear(2, rows, bias=False, dtype=torch.float64)
        cut = DTensor.from_local(mine, tensor_ranks, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
        module.weight = nn.Parameter(cut)
        fully_shard(module, mesh=mesh.weight_mesh())
        parallel = Parallel(module, (module,), module, mesh, True, {} if parts == 1 else {"weight": packing})
        local = module.weight.to_local().detach()
        return [(box, local[inside].numpy().copy()) for inside, box in boxes(module.weight, parallel, "weight")]

    seen = np.zeros(whole.shape)
    for pieces in on_ranks(rank, 4, tmp_path):
        for box, values in pieces:
            np.testing.assert_array_equal(values, whole.numpy()[box])
            seen[box] += 1
    assert (seen == 1).all()
