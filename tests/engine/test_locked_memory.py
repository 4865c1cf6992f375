"""The limit of locked memory, as the system has it for a process without rights of its own."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.engine.locked_memory import refuse_low_limit
from tests.ranks import on_ranks

NOBODY = 65534
CAP_IPC_LOCK = 14


def told(world: World, needed: int) -> str:
    """What a process is told that may lock 64 KiB."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**16, 2**16))
    if os.getuid() == 0:
        os.setuid(NOBODY)
    try:
        refuse_low_limit(needed, key="engine.offload_parameters")
    except ConfigError as error:
        return str(error)
    return ""


def test_what_cannot_be_locked_is_refused_and_no_less(tmp_path: Path) -> None:
    assert on_ranks(lambda world: told(world, 2**16), 1, tmp_path / "ranks") == [""]
    (line,) = on_ranks(lambda world: told(world, 3 * 2**20), 1, tmp_path / "ranks")
    rule = "locks 3.0 MiB and more a process, and may lock 0.1; nearest: cpu, or `ulimit -l unlimited` before the start"
    assert line.endswith(f"engine.offload_parameters=nvme: {rule}")


def may_lock_any() -> bool:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")]
    return bool(int(line.split()[1], 16) >> CAP_IPC_LOCK & 1)


@pytest.mark.skipif(not may_lock_any(), reason="needs the right to lock any number of bytes")
def test_a_process_with_the_right_to_lock_has_no_limit(tmp_path: Path) -> None:
    def locks(world: World) -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**16, 2**16))
        refuse_low_limit(2**40, key="engine.offload_optimizer")

    assert on_ranks(locks, 1, tmp_path / "ranks") == [None]
