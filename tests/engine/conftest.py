"""What the tests of DeepSpeed share: they import it, which changes torch, in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import with_deepspeed


@pytest.fixture(scope="module")
def imported() -> Iterator[None]:
    """DeepSpeed in the parent of all ranks: imported once."""
    with with_deepspeed.imported():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs of a module."""
    return tmp_path_factory.mktemp("deepspeed")
