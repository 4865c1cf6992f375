"""What was asked for on the command line, checked before anything heavy is imported."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from distllm.config.errors import ConfigError
from distllm.config.kinds import shown
from distllm.verify.engines import parse_engines
from distllm.verify.layouts import MOST_REAL, Layout, parse_layouts, parse_ranks

PRECISIONS = ("fp64", "fp32", "bf16")


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    ranks: Sequence[int] = (1, 2, 4, 8)
    layouts: Sequence[Layout] = ()
    """In place of every product over `ranks`."""
    precisions: Sequence[str] = ("fp64",)
    steps: int = 3
    faults: bool = False
    device: str = "cpu"
    real: int = MOST_REAL
    """Ranks that run together on this machine; larger layouts run a few ranks in a fake world."""
    timeout_s: float = 300.0
    engines: Sequence[str] = ("native",)


def options_of(
    *,
    ranks: str,
    layouts: str | None,
    precision: str,
    steps: int,
    faults: bool,
    device: str,
    timeout_s: float,
    engines: str = "native",
) -> Options:
    """The options of a command line.

    Args:
        ranks: `1,2,4,8`.
        layouts: `tp=2,pp=2;dp_shard=4`, in place of every product over `ranks`.
        precision: one or several of PRECISIONS with commas.
        steps: of each layout.
        faults: plant bugs too.
        device: cpu or cuda.
        timeout_s: seconds for one layout.
        engines: native, deepspeed or both, with commas.

    Raises:
        ConfigError: a value that cannot be.
    """
    wanted = [item.strip() for item in precision.split(",") if item.strip()]
    if not wanted or not set(wanted) <= set(PRECISIONS):
        raise ConfigError([f"--precision={shown(precision)}: must be of {', '.join(PRECISIONS)}, with commas; nearest: fp64"])
    if device not in ("cpu", "cuda"):
        raise ConfigError([f"--device={device}: must be cpu or cuda; nearest: cpu"])
    names = parse_engines(engines)
    given = parse_layouts(layouts) if layouts is not None else []
    numbers = parse_ranks(ranks)
    real = MOST_REAL
    if device == "cuda":
        real = gpus()
        numbers = [number for number in numbers if number <= real]
        if not real:
            raise ConfigError(["--device=cuda: no CUDA device is available here; nearest: cpu"])
    return Options(numbers, given, tuple(dict.fromkeys(wanted)), steps, faults, device, real, timeout_s, names)


def words_of(*, engines: str | None, precision: str, steps: int, device: str, timeout_s: float, trust: bool) -> str:
    """The options that say how to verify, and not which layouts, as the user types them; what is usual is left out."""
    usual = Options()
    given = (
        ("--engines", engines, None), ("--precision", precision, ",".join(usual.precisions)), ("--steps", steps, usual.steps),
        ("--device", device, usual.device), ("--timeout", timeout_s, usual.timeout_s),
    )  # fmt: skip
    words = [word for option, value, normal in given if value != normal for word in (option, f"{value}")]
    return shlex.join(words + ["--trust"] * trust)


def gpus() -> int:
    """The GPUs of this machine, counted without starting CUDA: a process that has used it cannot be forked into ranks."""
    import os

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch asks the driver's monitor and not CUDA
    import torch

    return torch.cuda.device_count()
