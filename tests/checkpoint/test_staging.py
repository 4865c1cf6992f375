from __future__ import annotations

import pytest
import torch

from distllm.checkpoint import staging
from distllm.checkpoint.chunk import Chunk
from distllm.checkpoint.staging import Staging
from distllm.config.errors import CheckpointError
from tests.checkpoint.conftest import chunks_of, equal

VALUES = {
    "byte": torch.arange(3, dtype=torch.uint8),
    "float": torch.randn(5, 7, generator=torch.Generator().manual_seed(1)),
    "bool": torch.tensor([True, False, True]),
    "double": torch.tensor(2.5, dtype=torch.float64),
    "brain": torch.arange(33).bfloat16(),
    "none": torch.zeros(0, 4),
    "turned": torch.arange(12.0).reshape(3, 4).t(),
}


class Runtime:
    """What of CUDA's runtime is called; remembers what is pinned."""

    def __init__(self, *, answer: int = 0) -> None:
        self.pinned: dict[int, int] = {}
        self.answer = answer

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.answer:
            self.pinned[address] = size
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_the_copies_are_equal_aligned_and_in_one_buffer_of_their_size() -> None:
    kept = Staging()
    copies = kept.copy(chunks_of(VALUES))
    assert equal(copies, VALUES)
    for name, value in VALUES.items():
        copy = copies[name].data
        assert copy.dtype == value.dtype and copy.shape == value.shape
        assert not value.numel() or copy.data_ptr() % copy.element_size() == 0
        assert not value.numel() or copy.data_ptr() != value.data_ptr()
    written = {n: c.data for n, c in copies.items() if c.write}
    assert len({t.untyped_storage().data_ptr() for t in written.values()}) == 1, "blocks of their own are rounded up"
    memory = next(iter(written.values())).untyped_storage().nbytes()
    assert memory <= sum(t.nbytes for t in written.values()) + 64 * len(written)


def test_what_another_rank_writes_takes_no_memory() -> None:
    data = torch.randn(1000)
    copies = Staging().copy({"w": Chunk(data, (1000,), (0,), False)})
    assert copies["w"].data is data


def test_pinned_memory_is_what_is_written_and_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = torch.empty(3 << 20, dtype=torch.uint8)
    staging._pin(memory)
    assert runtime.pinned == {memory.data_ptr(): 3 << 20}
    staging._pin(torch.empty(0, dtype=torch.uint8))
    del memory
    assert not runtime.pinned


def test_memory_that_cannot_be_pinned_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(answer=2))
    with pytest.raises(CheckpointError, match=r"cannot pin the 0\.0 GiB .*checkpoint\.asynchronous=false"):
        staging._pin(torch.empty(100, dtype=torch.uint8))
