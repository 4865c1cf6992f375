"""DeepSpeed in the process of the tests, imported once: the ranks that they fork have it then."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

INSTALLED = importlib.util.find_spec("deepspeed") is not None


@contextmanager
def imported() -> Iterator[None]:
    """DeepSpeed for a CPU, for as long as this is entered."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # what its start loads
    try:
        yield
    finally:
        del os.environ["DS_ACCELERATOR"]
        if before is not None:
            os.environ["DS_ACCELERATOR"] = before
