"""The copy of the state that a background write works on, so that training may go on changing the state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from distllm.checkpoint.chunk import Chunk


class Staging:
    """Host buffers for the chunks that this rank writes; kept from save to save, so that no save pays for page faults.

    They cost as much host memory as the rank writes; beside CUDA they are pinned, so that the copy runs at the full
    speed of the bus and does not wait tensor by tensor.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def reserve(self, chunks: Mapping[str, Chunk]) -> None:
        """Have a touched buffer for each chunk that is written, and none besides; does nothing when all fit already."""
        mine = {name: chunk.data for name, chunk in chunks.items() if chunk.write}
        for name in [n for n, b in self._buffers.items() if n not in mine or _kind(b) != _kind(mine[n])]:
            del self._buffers[name]
        for name in [n for n in mine if n not in self._buffers]:
            data = mine[name]
            self._buffers[name] = torch.zeros(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
            self._buffers[name].fill_(1)  # zeros of a fresh mapping are not in memory before they are written

    def copy(self, chunks: Mapping[str, Chunk]) -> dict[str, Chunk]:
        """The chunks with the written ones' data copied; when this returns, the originals may change."""
        self.reserve(chunks)
        on_gpu = [chunk.data.device for chunk in chunks.values() if chunk.write and chunk.data.is_cuda]
        for name, buffer in self._buffers.items():
            buffer.copy_(chunks[name].data.detach(), non_blocking=True)
        for device in set(on_gpu):
            torch.cuda.current_stream(device).synchronize()
        return {name: replace(c, data=self._buffers[name]) if c.write else c for name, c in chunks.items()}


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
