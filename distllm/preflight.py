"""The trial before a job of many ranks: the same versions, a network that carries, a folder that all see."""

from __future__ import annotations

import contextlib
import platform
import secrets
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distllm import __version__
from distllm.comm import World
from distllm.config.errors import EXIT_LOST, ConfigError, DistllmError, StorageError

LIMIT_S = 20.0
MIB = 4
"""What is all-reduced: more than the eager protocols take, and nothing against a model's gradients."""


class NetworkError(DistllmError):
    """The ranks met, but the network between them does not carry."""

    exit_code = EXIT_LOST


def preflight(world: World, *, shared: Path, node: str, limit_s: float = LIMIT_S) -> str:
    """Try what a training needs of its surroundings, in well under a second where all is well.

    Args:
        world: this rank's facts, of several.
        shared: the folder that every node must see and write.
        node: this node's name.
        limit_s: seconds for each collective.

    Returns:
        One line that says what was found.

    Raises:
        ConfigError: ranks have different versions of Python, torch or distllm.
        NetworkError: a collective did not come back in time.
        StorageError: a rank cannot write the folder, or does not see what another wrote.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit_s))
    try:
        facts = {"python": platform.python_version(), "torch": torch.__version__, "distllm": __version__}
        seen = _gathered((node, facts), world, group, limit_s)
        _compare(seen)
        seconds = _all_reduce(world, limit_s)
        _shared_folder(world, group, shared, nodes=[name for name, _ in seen], limit_s=limit_s)
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group(group)
    nodes = len({name for name, _ in seen})
    return (
        f"preflight: {world.size} ranks on {nodes} node{'s' if nodes > 1 else ''}, torch {torch.__version__}; "
        f"{MIB} MiB all-reduced in {1000 * seconds:.1f} ms ({MIB * 1.048576e-3 / seconds:.2f} GB/s); {shared} is shared"
    )


def _gathered(value: object, world: World, group: dist.ProcessGroup, limit_s: float) -> list[Any]:
    """The values of all ranks; object collectives of gloo keep the group's own time limit."""
    values: list[Any] = [None] * world.size
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        raise NetworkError(_slow("an exchange of a few bytes", limit_s)) from error
    return values


def _compare(seen: list[tuple[str, dict[str, str]]]) -> None:
    first_node, first = seen[0]
    for node, facts in seen:
        for name, version in facts.items():
            if version != first[name]:
                two = f"{node}: has {name} {version}, and {first_node} has {first[name]}"
                raise ConfigError([f"{two}; nearest: the same environment on every node"])


def _all_reduce(world: World, limit_s: float) -> float:
    """Seconds of an all-reduce of MIB MiB on the device that trains, after one that opens the connections."""
    group = dist.new_group(timeout=timedelta(seconds=limit_s))
    data = torch.ones(MIB * 2**18, device=world.device)
    try:
        for _ in range(2):
            began = time.perf_counter()
            dist.all_reduce(data, group=group, async_op=True).wait(timedelta(seconds=limit_s))
            if world.device.type == "cuda":
                torch.cuda.synchronize()
    except RuntimeError as error:
        raise NetworkError(_slow(f"an all-reduce of {MIB} MiB", limit_s)) from error
    seconds = time.perf_counter() - began
    expected = float(world.size) ** 2  # two sums of ones over all ranks
    if float(data[0]) != expected or float(data[-1]) != expected:
        wrong = f"preflight: an all-reduce gave {float(data[0])} where {expected} is right"
        raise NetworkError(f"{wrong}; nearest: another --interface, or another driver of the network")
    dist.destroy_process_group(group)
    return seconds


def _slow(what: str, limit_s: float) -> str:
    return (
        f"preflight: {what} did not come back within {limit_s:.0f} s; nearest: --interface with the network of the nodes, "
        "and a firewall that lets the nodes talk on all ports"
    )


def _shared_folder(world: World, group: dist.ProcessGroup, shared: Path, *, nodes: list[str], limit_s: float) -> None:
    """Every rank writes a file, and looks for those of all others."""
    token = _gathered(secrets.token_hex(4), world, group, limit_s)[0]
    mark = shared / ".launch" / f"preflight-{token}"
    trouble = None
    try:
        mark.mkdir(parents=True, exist_ok=True)
        (mark / str(world.rank)).write_text(token, encoding="utf-8")
    except OSError as error:
        trouble = f"{shared}: cannot be written on {nodes[world.rank]} ({error.strerror}); nearest: out=... in a shared folder"
    trouble = _first(trouble, world, group, limit_s)
    missing = [rank for rank in range(world.size) if trouble is None and not _sees(mark / str(rank))]
    if missing:
        trouble = (
            f"{shared}: {nodes[world.rank]} does not see what {nodes[missing[0]]} wrote there; "
            "nearest: out=... in a folder that every node shares"
        )
    told = _first(trouble, world, group, limit_s)
    for path in (mark / str(world.rank), mark):
        with contextlib.suppress(OSError):
            path.unlink() if path != mark else path.rmdir()
    if told is not None:
        raise StorageError(told)


def _first(trouble: str | None, world: World, group: dist.ProcessGroup, limit_s: float) -> str | None:
    """The trouble of the lowest rank that has one, on every rank."""
    return next((text for text in _gathered(trouble, world, group, limit_s) if text is not None), None)


def _sees(path: Path, *, patience_s: float = 5.0) -> bool:
    """Whether a file is there; network file systems show it a little later."""
    deadline = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
