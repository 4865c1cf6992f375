"""What a node gave to a run: processor time, memory, network; figures for the run's summary, read at its begin and end."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LINK_SKIPPED = ("lo",)


class NodeUse:
    """A meter of this process and its node, from now on. Costs two reads of /proc a run."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._node = _node_counters()
        self._cpu = _own_cpu()

    def read(self, *, node: str, device_peak: int | None) -> dict[str, Any]:
        """This rank's figures.

        Args:
            node: the node's name.
            device_peak: the most bytes that were allocated on this rank's GPU; None on a CPU.

        Returns:
            Plain numbers by name, for `node_summaries`.
        """
        seconds = max(1e-9, time.monotonic() - self._began)
        now = _node_counters()
        change = {name: now[name] - self._node[name] for name in now.keys() & self._node.keys()}
        figures: dict[str, Any] = {"node": node, "cpu_s": _own_cpu() - self._cpu, "rss": _peak_rss(), "gpu": device_peak}
        if change.get("cpu_all"):
            figures["cpu_percent"] = 100.0 * change["cpu_busy"] / change["cpu_all"]
        if "net" in change:
            figures["net_bytes_per_s"] = change["net"] / seconds
        return figures


def node_summaries(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of each node, from those of its ranks.

    Args:
        ranks: what `read` gave on each rank, in rank order.

    Returns:
        `node/N/...` by name, N counting the nodes in rank order: name, ranks, cpu_seconds (of the ranks), cpu_percent (of
        the whole node while the run took its steps), peak_memory_bytes (the sum of the ranks' peaks), gpu_peak_bytes (the
        largest of a rank), net_bytes_per_s (all interfaces but loopback, both directions).
    """
    nodes = list(dict.fromkeys(str(rank["node"]) for rank in ranks))
    found: dict[str, Any] = {}
    for number, node in enumerate(nodes):
        here = [rank for rank in ranks if rank["node"] == node]
        gpus = [rank["gpu"] for rank in here if rank["gpu"] is not None]
        figures = {
            "name": node,
            "ranks": len(here),
            "cpu_seconds": sum(rank["cpu_s"] for rank in here),
            "cpu_percent": here[0].get("cpu_percent"),
            "peak_memory_bytes": sum(rank["rss"] for rank in here),
            "gpu_peak_bytes": max(gpus, default=None),
            "net_bytes_per_s": here[0].get("net_bytes_per_s"),
        }
        found |= {f"node/{number}/{name}": value for name, value in figures.items() if value is not None}
    return found


def _own_cpu() -> float:
    times = os.times()
    return times.user + times.system


def _peak_rss() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _node_counters() -> dict[str, int]:
    """Counters of the whole node since it was started; none where there is no /proc."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        links = Path("/proc/net/dev").read_text().splitlines()[2:]
    except (OSError, ValueError, IndexError):
        return {}
    rows = [(name.strip(), counts.split()) for name, _, counts in (line.partition(":") for line in links)]
    network = sum(int(counts[0]) + int(counts[8]) for name, counts in rows if name not in _LINK_SKIPPED)
    idle = ticks[3] + ticks[4]
    return {"cpu_all": sum(ticks), "cpu_busy": sum(ticks) - idle, "net": network}
