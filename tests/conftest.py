"""What holds for all tests: signals begin as in a terminal, and a test of what this machine lacks is left out or skipped.

A shell without job control starts `pytest &` with SIGINT ignored, and nohup ignores SIGHUP; both are inherited by every
program that a test starts.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests import with_deepspeed
from tests.launch import cluster, hosts

_WHY = pytest.StashKey[list[str]]()
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip those of DeepSpeed, and leave those of SLURM and of real ssh out, and say why, where there can be none."""
    for item in items:
        if item.get_closest_marker("deepspeed") and not with_deepspeed.INSTALLED:
            item.add_marker(pytest.mark.skip(reason="DeepSpeed is not installed"))
    config.stash[_WHY] = []
    for marker, name, missing in (("slurm", "SLURM", cluster.missing), ("hosts", "real ssh", hosts.missing)):
        wanted = [item for item in items if item.get_closest_marker(marker)]
        why = missing() if wanted else ""
        if why:
            items[:] = [item for item in items if item not in wanted]
            config.hook.pytest_deselected(items=wanted)
            config.stash[_WHY].append(f"{len(wanted)} tests of {name} are left out: {why}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The reason for what was left out."""
    for line in config.stash.get(_WHY, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="module", autouse=True)
def imported(request: pytest.FixtureRequest) -> Iterator[None]:
    """DeepSpeed in the parent of all ranks, for the modules that are marked with it."""
    if request.node.get_closest_marker("deepspeed") is None or not with_deepspeed.INSTALLED:
        yield
        return
    with with_deepspeed.imported():
        yield
