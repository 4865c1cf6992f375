"""Facts of the machine."""

from __future__ import annotations

import os
import socket

import pytest

from distllm.config.machine import cores, reachable


def test_cores_are_those_that_this_process_may_use() -> None:
    assert cores() == len(os.sched_getaffinity(0))


def test_what_listens_is_reachable_and_what_does_not_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert reachable(address)
    assert not reachable(address)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert reachable(address)  # the proxy decides
