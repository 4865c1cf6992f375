"""DeepSpeed's reading and writing of files in plain Python, in the place of its compiled op: that takes minutes to build.

With COMPILED_IO=1 in the environment the tests use the op, which is compiled by the first that needs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from distllm.engine import deepspeed_start

ALIGNED = 512
"""Bytes: what the true one reads and writes past the page cache begins and ends at multiples of it (O_DIRECT)."""


class Handle:
    """What the swapping of stage 3 uses of `aio_handle`; it does what it was asked for as late as the true one may."""

    def __init__(self, **_: Any) -> None:
        self._pinned: set[int] = set()
        self._asked: list[Callable[[], object]] = []

    def new_cpu_locked_tensor(self, numel: int, example: torch.Tensor) -> torch.Tensor:
        room = torch.empty(numel * example.element_size() + ALIGNED, dtype=torch.uint8)
        self._pinned.add(room.untyped_storage().data_ptr())
        start = -room.data_ptr() % ALIGNED
        return room.narrow(0, start, numel * example.element_size()).view(example.dtype)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        self._pinned.discard(tensor.untyped_storage().data_ptr())
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        return self._ask(tensor, lambda: tensor.copy_(_read(tensor, path, offset)))

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        assert offset == 0
        return self._ask(tensor, lambda: Path(path).write_bytes(tensor.view(torch.uint8).numpy().tobytes()))

    def wait(self) -> int:
        asked, self._asked = self._asked, []
        for do in asked:
            do()
        return len(asked)

    def _ask(self, tensor: torch.Tensor, do: Callable[[], object]) -> int:
        if self.is_pinned(tensor):  # what is not, the true one copies to where it is
            assert tensor.data_ptr() % ALIGNED == 0 and tensor.nbytes % ALIGNED == 0, "O_DIRECT refuses it"
        self._asked.append(do)
        return 0


def _read(like: torch.Tensor, path: str, offset: int) -> torch.Tensor:
    values = np.fromfile(path, dtype=np.uint8, count=like.nbytes, offset=offset)
    assert values.size == like.nbytes, f"{path} is shorter than what is read of it"
    return torch.from_numpy(values).view(like.dtype)


def use_python() -> None:
    """Let DeepSpeed of this process take it, unless the op was asked for."""
    if os.environ.get("COMPILED_IO"):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    deepspeed_start.refuse_low_limit = lambda needed, key: None  # nothing is locked here
    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True  # type: ignore[method-assign]
    AsyncIOBuilder.load = lambda self, verbose=False: SimpleNamespace(aio_handle=Handle)  # type: ignore[method-assign]
