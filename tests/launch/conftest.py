"""One SLURM for all tests that are marked with it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster, cluster


@pytest.fixture(scope="session")
def running_slurm() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="distllm-slurm-"))  # short: a socket's path may have 107 characters
    try:
        with cluster(folder) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slurm(running_slurm: Cluster) -> Iterator[Cluster]:
    """The cluster with both nodes free; a test that fails leaves no job to the next."""
    running_slurm.clear()
    yield running_slurm
    running_slurm.clear()
