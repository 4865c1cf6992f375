"""Layouts that are too large for one machine: a few ranks, without the others."""

from __future__ import annotations

import pytest
import torch

from distllm.verify import fake
from distllm.verify.command import Verification
from distllm.verify.layouts import layout_of

LARGE = [
    {"dp_shard": 64}, {"dp_replicate": 16}, {"dp_replicate": 4, "dp_shard": 32}, {"dp_shard": 8, "tp": 4},
    {"pp": 4, "dp_shard": 4, "tp": 2}, {"dp_shard": 4, "cp": 4},
]  # fmt: skip


@pytest.mark.parametrize("layout", LARGE, ids=str)
def test_shapes_and_traffic_of_a_large_layout_are_those_of_arithmetic(layout: dict[str, int], verification: Verification) -> None:
    row = verification.run(layout_of(layout))
    assert row.fake and row.equal, (row.broken, row.verdict and row.verdict.problems)
    assert row.verdict is not None and row.verdict.compared > 20 and len(row.traffic) >= 2


def test_a_wrong_shape_is_seen(verification: Verification, monkeypatch: pytest.MonkeyPatch) -> None:
    true = fake.own_shape

    monkeypatch.setattr(fake, "own_shape", lambda step, name, parameter: (true(step, name, parameter)[0] + 1,))
    row = verification.run(layout_of({"dp_shard": 16}))
    assert row.verdict is not None and row.verdict.problems[0].startswith("shape: ")


def test_ranks_that_stand_for_all() -> None:
    assert fake.representatives(layout_of({"dp_shard": 4096})) == (0, 4095)
    assert fake.representatives(layout_of({"pp": 4, "dp_shard": 8})) == (0, 7, 8, 16, 24, 31)


def test_counts_come_back_in_a_fake_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda output, input, *a, **k: None)
    counts, out = torch.tensor([3, 1]), torch.zeros(2, dtype=torch.int64)
    with fake._answering():
        torch.distributed.all_to_all_single(out, counts)
    assert torch.equal(out, counts)
