"""From what ranks measured to figures, and scaling."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distllm.bench.figures import Point, Scaling, as_json, figures_of, scaling, spread
from distllm.bench.measure import RankFigures

ONE = RankFigures(
    device="CPU", threads=2, step_s=(0.1, 0.2, 0.3), wait_s=(0.0, 0.0, 0.06), cpu_s=0.9, tokens=(100, 100, 100), memory=1000,
    matrix_rate=5e9, sheet_peak=None, sent={"dp_shard all_gather": (4, 80), "dp_shard all_reduce": (1, 20)}, loss=1.0,
)  # fmt: skip


def test_ranks_become_one_row() -> None:
    other = replace(ONE, step_s=(0.1, 0.25, 0.2), memory=3000, sent={"dp_shard all_gather": (4, 50)}, cpu_s=0.3)
    found = figures_of([ONE, other], flops={"palm": 1e6, "nanogpt": 2e6}, computed=4 / 3)
    assert found.step_s == (0.1, 0.25, 0.3)  # each step is as slow as its slowest rank
    assert found.time.median == 0.25 and found.tokens_per_s == 400.0
    assert found.cpu_s_per_token == pytest.approx(1.2 / 300)
    assert found.wait_share == pytest.approx(0.06 / 0.55)
    assert found.memory == 3000 and found.sent == 100 and found.devices == 4
    assert found.peak == 1e10 and found.peak_name == "matrix products of the same run"
    assert found.mfu == {"palm": pytest.approx(400 * 1e6 / 1e10), "nanogpt": pytest.approx(400 * 2e6 / 1e10)}
    assert found.hfu == pytest.approx(found.mfu["palm"] * 4 / 3)


def test_a_device_of_the_table_is_measured_against_its_data_sheet() -> None:
    gpu = replace(ONE, device="NVIDIA H100 80GB HBM3", sheet_peak=989.5e12, sent=None)
    found = figures_of([gpu, gpu], flops={"palm": 1e12}, computed=None)
    assert found.peak == 2 * 989.5e12 and found.peak_name == "data sheet of NVIDIA H100 80GB HBM3"
    assert found.matrix_rate == 1e10 and found.devices == 2 and found.sent is None and found.hfu is None


def test_a_loss_that_is_not_finite_is_written_as_null() -> None:
    assert as_json(figures_of([replace(ONE, loss=float("nan"))], flops={}, computed=None))["loss"] is None


def test_spread_is_robust() -> None:
    calm = spread([1.0, 1.02, 0.98, 1.01, 0.99])
    assert calm.median == 1.0 and (calm.low, calm.high) == (0.99, 1.01)
    assert calm.error == pytest.approx(1.2533 * 1.4826 * 0.01 / 5**0.5)
    assert spread([1.0, 1.02, 0.98, 1.01, 50.0]).error < 0.03  # one step that was held up
    assert spread([3.0]) == spread([3.0, 3.0])


def test_scaling_compares_the_same_work_on_fewer_devices() -> None:
    points = [
        Point("a", 1, 8, 100.0),
        Point("a", 2, 8, 150.0),  # the same global batch: strong
        Point("a", 2, 16, 180.0),  # the same batch a device: weak
        None,
        Point("b", 2, 8, 150.0),  # another precision: nothing to compare with
        Point("a", 1, 8, 80.0),  # slower than the other with one device, which is the base
        Point("a", 4, 64, 300.0),  # neither
    ]
    found = scaling(points)
    assert found == [None, Scaling("strong", 0, 0.75), Scaling("weak", 0, 0.9), None, None, None, None]
