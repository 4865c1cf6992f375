"""What holds for all tests: signals begin as in a terminal, whatever started the tests.

A shell without job control starts `pytest &` with SIGINT ignored, and nohup ignores SIGHUP; both are inherited by every
program that a test starts.
"""

from __future__ import annotations

import signal

import pytest

from tests.launch import cluster, hosts

_WHY = pytest.StashKey[list[str]]()
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of SLURM and of real ssh out, and say why, where there can be none."""
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
