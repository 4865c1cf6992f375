"""The trial before a job of many ranks: what it finds, and that a fault is one error on every rank."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from distllm import preflight as trial
from distllm.comm import World
from distllm.config.errors import ConfigError, StorageError
from distllm.preflight import NetworkError, preflight
from tests.ranks import on_ranks


def test_a_good_job_passes_in_a_line_and_leaves_nothing(tmp_path: Path) -> None:
    shared = tmp_path / "runs"
    lines = on_ranks(lambda world: preflight(world, shared=shared, node=f"n{world.rank // 2}"), 3, tmp_path / "ranks")
    assert all(line.startswith("preflight: 3 ranks on 2 nodes, torch ") for line in lines)
    assert "4 MiB all-reduced in " in lines[0] and lines[0].endswith(f"{shared} is shared")
    assert list((shared / ".launch").iterdir()) == []


def test_other_versions_are_told_on_every_rank(tmp_path: Path) -> None:
    def rank(world: World) -> str:
        if world.rank == 1:
            trial.torch.__version__ = "1.0"  # type: ignore[misc]
        with pytest.raises(ConfigError) as caught:
            preflight(world, shared=tmp_path / "runs", node=f"n{world.rank}")
        return str(caught.value)

    first, second = on_ranks(rank, 2, tmp_path / "ranks")
    assert first == second and first.startswith("n1: has torch 1.0, and n0 has 2.")
    assert first.endswith("; nearest: the same environment on every node")


def test_a_folder_that_a_node_does_not_share_is_told_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial._sees, "__kwdefaults__", {"patience_s": 0.2})

    def rank(world: World) -> str:
        with pytest.raises(StorageError) as caught:
            preflight(world, shared=tmp_path / f"disk-{world.rank}", node=f"n{world.rank}")
        return str(caught.value)

    told = on_ranks(rank, 2, tmp_path / "ranks")
    assert told[0] == told[1] == (
        f"{tmp_path}/disk-0: n0 does not see what n1 wrote there; nearest: out=... in a folder that every node shares"
    )


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def rank(world: World) -> str:
        with pytest.raises(StorageError) as caught:
            preflight(world, shared=tmp_path / "file" if world.rank else tmp_path, node=f"n{world.rank}")
        return str(caught.value)

    assert "cannot be written on n1 (Not a directory)" in on_ranks(rank, 2, tmp_path / "ranks")[0]


def test_a_network_that_does_not_carry_is_told_in_time(tmp_path: Path) -> None:
    def rank(world: World) -> bool:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1.0))
        if world.rank == 1:
            time.sleep(3.0)  # it joined, and says nothing more
            return True
        with pytest.raises(NetworkError, match="an exchange of a few bytes did not come back within 1 s; nearest: --interface"):
            trial._gathered(1, world, group, 1.0)
        return True

    assert on_ranks(rank, 2, tmp_path / "ranks") == [True, True]
