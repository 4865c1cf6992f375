"""What the tests of DeepSpeed share: they import it, which changes torch, in a process of their own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def imported() -> Iterator[None]:
    """DeepSpeed in the parent of all ranks: imported once."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: F401
    yield
    del os.environ["DS_ACCELERATOR"]
    if before is not None:
        os.environ["DS_ACCELERATOR"] = before


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs of a module."""
    return tmp_path_factory.mktemp("deepspeed")
