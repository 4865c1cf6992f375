"""The copy of the state that a background write works on, so that training may go on changing the state."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace

import torch

from distllm.checkpoint.chunk import Chunk
from distllm.config.errors import CheckpointError

_ALIGNED = 64  # bytes: a multiple of every element's size, and a line of the cache


class Staging:
    """One host buffer for all that this rank writes; kept from save to save, so that no save pays for page faults.

    It costs as much host memory as the rank writes (and under 64 bytes a tensor more). Beside CUDA it is pinned, so that
    the copy runs at the full speed of the bus and does not wait tensor by tensor.
    """

    def __init__(self) -> None:
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, torch.Tensor] = {}

    def reserve(self, chunks: Mapping[str, Chunk]) -> None:
        """Have a place, in touched memory, for each chunk that is written; does nothing when all fit already.

        The state should be whole when this is called: one that grows later is given another buffer, by the save.
        """
        mine = {name: chunk.data for name, chunk in chunks.items() if chunk.write}
        if {n: _kind(t) for n, t in mine.items()} == {n: _kind(t) for n, t in self._views.items()}:
            return
        self._views = {}
        self._arena = torch.empty(0, dtype=torch.uint8)  # the old memory goes before the new comes
        begins, end = {}, 0
        for name, data in mine.items():
            begins[name] = end
            end += -(-data.numel() * data.element_size() // _ALIGNED) * _ALIGNED
        self._arena = torch.empty(end, dtype=torch.uint8).fill_(1)  # memory is there only once it has been written to
        if any(data.is_cuda for data in mine.values()):
            _pin(self._arena)
        for name, data in mine.items():
            place = self._arena[begins[name] : begins[name] + data.numel() * data.element_size()]
            self._views[name] = place.view(data.dtype).view(data.shape)

    def copy(self, chunks: Mapping[str, Chunk]) -> dict[str, Chunk]:
        """The chunks with the written ones' data copied; when this returns, the originals may change."""
        self.reserve(chunks)
        on_gpu = [chunk.data.device for chunk in chunks.values() if chunk.write and chunk.data.is_cuda]
        for name, view in self._views.items():
            view.copy_(chunks[name].data.detach(), non_blocking=True)
        for device in set(on_gpu):
            torch.cuda.current_stream(device).synchronize()
        return {name: replace(c, data=self._views[name]) if c.write else c for name, c in chunks.items()}


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _pin(memory: torch.Tensor) -> None:
    """Pin a block in place; torch's `pin_memory` rounds each block up to a power of two, which may double a large one."""
    if not memory.numel():
        return
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    failed = int(runtime.cudaHostRegister(address, memory.numel(), 0))
    if failed:
        raise CheckpointError(
            f"checkpoint.asynchronous=true: CUDA cannot pin the {memory.numel() / 2**30:,.1f} GiB of host memory that a "
            f"background save needs (CUDA error {failed}); use checkpoint.asynchronous=false"
        )
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
