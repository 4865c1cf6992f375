"""A small state, checkpoints of it, and forked children that die on purpose."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from distllm.checkpoint.chunk import Chunk
from distllm.checkpoint.commit import Save, write
from distllm.checkpoint.manager import CheckpointManager
from distllm.comm import World
from distllm.config.schema import CheckpointConfig

ONE = World(0, 1, 0, 1, torch.device("cpu"))
LOGGER = logging.getLogger("tests.checkpoint")
SHAPES = {"model.w": (7, 5), "model.b": (3,), "optim.w.exp_avg": (7, 5), "optim.w.step": (), "model.none": (0, 4)}
ABOUT = {"facts": {"samples": 12}, "layout": {"dp_shard": 1}, "config_yaml": "name: run\n", "config_digest": "abc"}
SYSTEM_CALLS = ["open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "symlink"]


def tensors(version: int) -> dict[str, torch.Tensor]:
    """Other values for each version."""
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def chunks_of(values: Mapping[str, torch.Tensor]) -> dict[str, Chunk]:
    return {n: Chunk(v, tuple(v.shape), (0,) * v.dim(), v.numel() > 0) for n, v in values.items()}


def blank() -> dict[str, Chunk]:
    return chunks_of({name: torch.zeros(shape) for name, shape in SHAPES.items()})


def manager(folder: Path, *, world: World = ONE, attempt: str = "a", **config: object) -> CheckpointManager:
    return CheckpointManager(
        folder, config=CheckpointConfig(**config), world=world, attempt=attempt, logger=LOGGER, timeout_s=20.0
    )


def save(kept: CheckpointManager, step: int, *, version: int | None = None) -> None:
    values = tensors(step if version is None else version)
    kept.save(step, chunks_of(values), rng={"torch": torch.arange(step, step + 5, dtype=torch.uint8)}, **ABOUT)


def equal(chunks: Mapping[str, Chunk], values: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(chunks[name].data, values[name]) for name in values)


def names(folder: Path) -> list[str]:
    """What lies in a folder of checkpoints, but for the lock."""
    return sorted(set(os.listdir(folder)) - {".lock"})


def save_of(folder: Path, *, rank: int, size: int, step: int = 1, tag: str = "t", timeout_s: float = 20.0) -> Save:
    about = {k: v for k, v in ABOUT.items() if k != "facts"}
    return Save(folder, step, tag, rank, size, timeout_s, facts={"samples": 12}, **about)


def two_rank_chunks(rank: int, version: int) -> dict[str, Chunk]:
    """Rows 0..3 on rank 0 and 4..6 on rank 1; what is not a matrix on rank 0."""
    result = {}
    for name, value in tensors(version).items():
        if value.shape == (7, 5):
            part = value[:4] if rank == 0 else value[4:]
            result[name] = Chunk(part, (7, 5), (4 * rank, 0), True)
        else:
            result[name] = Chunk(value, tuple(value.shape), (0,) * value.dim(), rank == 0 and value.numel() > 0)
    return result


def write_two(folder: Path, *, step: int = 1) -> Path:
    """A checkpoint of two ranks, written without a process group: writing needs none."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in (1, 0):
        rng = {"torch": torch.full((4,), rank, dtype=torch.uint8)}
        write(save_of(folder, rank=rank, size=2, step=step), two_rank_chunks(rank, step), rng)
    return folder / f"step-{step}"


def fork(function: Callable[[], None]) -> int:
    """Start a child that calls `function`; exits 0, or 1 if it raised."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        function()
        code = 0
    finally:
        os._exit(code)


def died(child: int) -> bool:
    """Wait for a child; whether it was killed. A child that raised fails the test."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the child raised"
    return False


def die_at(call: int) -> None:
    """Kill this process just before its `call`-th system call that changes the disk; a write is torn in half first."""
    left = [call]
    for name in SYSTEM_CALLS:
        real = getattr(os, name)

        def counted(*args, real=real, name=name, **kwargs):  # type: ignore[no-untyped-def]
            if left[0] == 0:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **kwargs)

        setattr(os, name, counted)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"
