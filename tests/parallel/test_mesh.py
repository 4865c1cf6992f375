"""The mesh: who stands with whom, and that an axis of size 1 costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distllm.comm import World
from distllm.parallel.mesh import AXES, build_mesh
from tests.ranks import on_ranks


def sizes(**wide: int) -> dict[str, int]:
    return dict.fromkeys(AXES, 1) | wide


def test_one_process_makes_no_group() -> None:
    mesh = build_mesh(World(0, 1, 0, 1, torch.device("cpu")), sizes=sizes())
    assert mesh.devices is None and mesh.loss_group is None and not dist.is_initialized()
    assert (mesh.dp_rank, mesh.dp_size) == (0, 1)
    assert mesh.submesh("dp_replicate", "dp_shard") is None
    assert mesh.coordinates() == dict.fromkeys(AXES, 0)


def test_replicas_are_the_outer_axis(tmp_path: Path) -> None:
    def rank(world: World) -> Any:
        mesh = build_mesh(world, sizes=sizes(dp_replicate=2, dp_shard=2))
        assert mesh.loss_group is not None and mesh.devices is not None
        shard = dist.get_process_group_ranks(mesh.devices.get_group("dp_shard"))
        everyone = dist.get_process_group_ranks(mesh.loss_group)
        place = mesh.coordinates()
        return mesh.dp_rank, shard, everyone, (place["dp_replicate"], place["dp_shard"])

    assert on_ranks(rank, 4, tmp_path) == [
        (0, [0, 1], [0, 1, 2, 3], (0, 0)), (1, [0, 1], [0, 1, 2, 3], (0, 1)),
        (2, [2, 3], [0, 1, 2, 3], (1, 0)), (3, [2, 3], [0, 1, 2, 3], (1, 1)),
    ]  # fmt: skip


def test_axes_of_size_one_have_no_group(tmp_path: Path) -> None:
    def rank(world: World) -> Any:
        mesh = build_mesh(world, sizes=sizes(dp_shard=2))
        assert mesh.devices is not None
        return mesh.devices.mesh_dim_names, mesh.submesh("dp_replicate") is None

    assert on_ranks(rank, 2, tmp_path) == [(("dp_shard",), True)] * 2


def test_sizes_that_do_not_make_the_world_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="axes multiply to 2, the world has 1 ranks"):
        build_mesh(World(0, 1, 0, 1, torch.device("cpu")), sizes=sizes(dp_shard=2))
