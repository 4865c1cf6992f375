"""What a rank sets in its own process before it computes: threads, memory allocator, number formats, random state."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import sys

import numpy as np
import torch

from distllm.comm import World
from distllm.config.machine import cores
from distllm.config.schema import Config


def tune_host(config: Config, world: World, *, allocator: bool = True) -> None:
    """Set threads, allocator and number formats of this process.

    Args:
        config: `train.threads`, `train.deterministic` and `precision.tf32` are read.
        world: local ranks share the cores.
        allocator: whether to set that of memory too.
    """
    torch.set_num_threads(config.train.threads or _threads(world.local_size))
    if allocator and world.device.type == "cpu":
        keep_memory()
    torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _threads(local_size: int) -> int:
    """A rank's share of the cores, or what OMP_NUM_THREADS says to a process that is alone on its machine.

    Two runs side by side with more threads than cores wait for each other, at a thirtieth of the speed, so the user's word
    counts. To ranks of many it does not: torchrun says 1 unasked.
    """
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if local_size == 1 and told.isdecimal() and int(told) > 0:
        return int(told)
    return max(1, cores() // local_size)


def keep_memory() -> None:
    """Let glibc keep freed memory instead of giving it back and faulting it in again at every step.

    Large temporaries are otherwise mapped and unmapped each time; keeping them is worth 8 to 60 % of a step on a CPU.
    Other C libraries have no mallopt, and nothing changes there.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_mmap_max, m_trim_threshold, m_top_pad = -4, -1, -2
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 << 20)


def memory_of(device: torch.device) -> int:
    """The bytes of memory that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seed_rank(seed: int, *, dp_rank: int, step: int) -> None:
    """Seed every generator of this process; data-parallel ranks differ, so that their dropout does.

    `step` is where the run goes on, so that a resume on another layout does not draw the masks of its beginning again.
    """
    mixed = int.from_bytes(hashlib.sha256(f"{seed} {dp_rank} {step}".encode()).digest()[:4], "little")
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of every generator of this process, as byte tensors: nothing that would need a pickle."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    plain = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss]}
    state = {"host": torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)}
    state["torch"] = torch.get_rng_state()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], *, device: torch.device) -> None:
    """Put back what `random_state` took; a generator that it did not have is left alone."""
    plain = json.loads(state["host"].numpy().tobytes())
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
