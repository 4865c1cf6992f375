"""What a node gave to a run."""

from __future__ import annotations

import sys

import pytest

from distllm.track.node_use import NodeUse, node_summaries


def test_a_summary_for_each_node() -> None:
    rank = {"cpu_s": 2.0, "rss": 100, "gpu": None, "cpu_percent": 50.0, "net_bytes_per_s": 7.0}
    found = node_summaries([rank | {"node": "b"}, rank | {"node": "b", "gpu": 5}, rank | {"node": "a", "gpu": 9}])
    assert found["node/0/name"] == "b" and found["node/1/name"] == "a"
    assert found["node/0/ranks"] == 2 and found["node/0/cpu_seconds"] == 4.0 and found["node/0/peak_memory_bytes"] == 200
    assert found["node/0/gpu_peak_bytes"] == 5 and found["node/1/gpu_peak_bytes"] == 9
    assert found["node/1/cpu_percent"] == 50.0 and found["node/1/net_bytes_per_s"] == 7.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_reading() -> None:
    use = NodeUse()
    sum(i * i for i in range(2_000_000))
    figures = use.read(node="n", device_peak=None)
    assert figures["cpu_s"] > 0 and figures["rss"] > 2**20
    assert 0 <= figures["cpu_percent"] <= 100 and figures["net_bytes_per_s"] >= 0
    assert "node/0/gpu_peak_bytes" not in node_summaries([figures])
