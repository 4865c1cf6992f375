"""Facts of the machine."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path

import pytest

from distllm.config import machine
from distllm.config.machine import cores, cpu_limit, reachable


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = len(os.sched_getaffinity(0))
    assert 1 <= cores() <= bound
    for limit, found in ((math.inf, bound), (0.5, 1), (1.9, 1), (bound + 7.0, bound)):
        monkeypatch.setattr(machine, "cpu_limit", lambda limit=limit: limit)
        assert cores() == found


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # a container's own name for its group
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),  # the machine itself: its top group has no such file
        ("0::/a.slice/b\n", {"a.slice/b/cpu.max": "max 100000\n", "a.slice/cpu.max": "400000 100000\n"}, 4.0),
        (
            "2:cpuset:/d/1\n1:cpu,cpuacct:/d/1\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            2.0,
        ),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        (None, {}, math.inf),  # no Linux
    ],
)  # fmt: skip
def test_the_cpu_time_of_a_container_is_a_number_of_cores(
    own: str | None, files: dict[str, str], limit: float, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert cpu_limit(tmp_path / "mount", tmp_path / "own") == limit


def test_what_listens_is_reachable_and_what_does_not_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert reachable(address)
    assert not reachable(address)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert reachable(address)  # the proxy decides
