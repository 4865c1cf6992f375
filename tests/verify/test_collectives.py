"""Every kind of collective is seen once, with the bytes that a ring sends."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distllm.comm import World
from distllm.parallel.mesh import AXES, build_mesh
from distllm.verify.collectives import Recorder, Sent, ring_bytes
from distllm.verify.formulas import BUCKET, FIRST_BUCKET, Ledger, buckets
from tests.ranks import on_ranks


def test_the_bytes_of_a_ring() -> None:
    assert ring_bytes("all_reduce", whole=12, ranks=4) == 18
    assert ring_bytes("all_gather", whole=12, ranks=4) == ring_bytes("reduce_scatter", whole=12, ranks=4) == 9
    assert ring_bytes("all_reduce", whole=8, ranks=3) == Fraction(32, 3)


def test_ours_functional_and_point_to_point(tmp_path: Path) -> None:
    def rank(world: World) -> Any:
        mesh = build_mesh(world, sizes=dict.fromkeys(AXES, 1) | {"dp_replicate": 2, "dp_shard": 2})
        group, whole = mesh.group("dp_shard"), torch.ones(4)
        assert group is not None
        other = group.size() * (world.rank // 2) + 1 - world.rank % 2
        splits = [1, 3] if world.rank % 2 == 0 else [3, 1]
        with Recorder(mesh) as recorder:
            dist.all_reduce(torch.ones(3), group=mesh.loss_group)
            dist.all_gather(list(torch.empty(2, 4)), whole, group=group)
            dist.all_to_all_single(torch.empty(4), whole, [1, 3] if world.rank % 2 == 0 else [3, 1], splits, group=group)
            replicas = mesh.group("dp_replicate")
            assert replicas is not None
            ops = torch.ops._c10d_functional
            ops.wait_tensor(ops.all_reduce(whole, "sum", replicas.group_name))
            ops.wait_tensor(ops.all_gather_into_tensor(whole, 2, group.group_name))
            ops.wait_tensor(ops.reduce_scatter_tensor(torch.ones(8), "sum", 2, group.group_name))
            for work in dist.batch_isend_irecv([
                dist.P2POp(dist.isend, whole, other, group=group), dist.P2POp(dist.irecv, torch.empty(4), other, group=group),
            ]):  # fmt: skip
                work.wait()
        return recorder.traffic

    found = on_ranks(rank, 4, tmp_path)
    assert found[0] == {
        ("dp_replicate+dp_shard", "all_reduce"): Sent(1, Fraction(18)),  # 2 x 3/4 x 12 bytes
        ("dp_shard", "all_gather"): Sent(2, Fraction(32)),  # twice half of 32 bytes
        ("dp_shard", "all_to_all"): Sent(1, Fraction(12)),  # three of four numbers leave rank 0
        ("dp_replicate", "all_reduce"): Sent(1, Fraction(16)),
        ("dp_shard", "reduce_scatter"): Sent(1, Fraction(16)),
        ("dp_shard", "send"): Sent(1, Fraction(16)),
    }
    assert found[1][("dp_shard", "all_to_all")] == Sent(1, Fraction(12))


def test_a_group_of_one_sends_nothing() -> None:
    ledger = Ledger(dict.fromkeys(AXES, 1))
    ledger.ring(ledger.group("dp_shard", "cp"), "all_reduce", 100)
    assert ledger.traffic == {}


def test_the_wide_axes_give_a_group_its_name() -> None:
    ledger = Ledger(dict.fromkeys(AXES, 1) | {"dp_shard": 2, "tp": 4})
    assert ledger.group("dp_shard", "ep", "cp") == ("dp_shard", 2)
    assert ledger.group("dp_shard", "tp") == ("dp_shard+tp", 8)


@pytest.mark.parametrize(
    ("sizes", "packed"),
    [
        ([10, 20], [30]),
        ([FIRST_BUCKET - 1, 1, 5], [FIRST_BUCKET, 5]),
        ([FIRST_BUCKET, BUCKET - 1, 2, 7], [FIRST_BUCKET, BUCKET + 1, 7]),
        ([], []),
    ],
)
def test_buckets_close_when_they_are_full(sizes: list[int], packed: list[int]) -> None:
    assert buckets(sizes) == packed
