"""What a rank does for the launcher that started it: it asks who it is, tries its surroundings, and says how it ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distllm.config.errors import ConfigError
from distllm.launch.reports import Report, tell_torchrun, write_report
from distllm.rank_facts import node_name, rank_facts

if TYPE_CHECKING:
    from distllm.comm import World


@contextmanager
def requests_held() -> Iterator[None]:
    """Keep a SIGUSR1 that comes before a `StopRequest` is entered until then; it would end or miss a rank that starts.

    Blocked, and not ignored: a scheduler sends it once, and a rank takes seconds to import torch. One that is still held
    at the end, because no loop began, is dropped.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGUSR1, handler)


def tried_first(world: World, *, shared: Path) -> None:
    """Run the preflight where `distllm launch` asked for it.

    Args:
        world: this rank's facts.
        shared: the folder that every node must see.

    Raises:
        DistllmError: as `preflight`, on every rank.
    """
    if world.size > 1 and os.environ.get("DISTLLM_PREFLIGHT") == "1":
        from distllm.faults import say
        from distllm.preflight import preflight

        line = preflight(world, shared=shared, node=node_name())
        if world.is_main:
            say(line)


def report_end(*, code: int, lines: Sequence[str]) -> None:
    """Write down how this rank ended, for the launcher and for torchrun's summary.

    Args:
        code: what the process will exit with.
        lines: what its error means.
    """
    tell_torchrun(lines, file=os.environ.get("TORCHELASTIC_ERROR_FILE"), code=code)
    folder = os.environ.get("DISTLLM_LAUNCH")
    if folder:
        write_report(Path(folder), Report(_rank(), node_name(), code, tuple(lines), time.time()))


def show_log() -> None:
    """Show what distllm says on its way, such as that a text has changed; of many ranks the first does."""
    from distllm.track.log import show_lines

    if not later_rank():
        show_lines()


def world_size() -> int | None:
    """The number of ranks that a launcher has started; None where nobody has."""
    try:
        facts = rank_facts()
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    return None if facts is None else facts.size


def later_rank() -> bool:
    """Whether another rank of the job tells what all ranks would."""
    try:
        facts = rank_facts()
    except ValueError:  # each is told that it would train by itself, by the first task of srun alone
        return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0"
    return facts is not None and facts.rank > 0


def _rank() -> int:
    """This rank's number; where the variables contradict each other, as the launcher counts."""
    try:
        facts = rank_facts()
        return 0 if facts is None else facts.rank
    except ValueError:
        text = os.environ.get("SLURM_PROCID") or os.environ.get("RANK") or "0"
        return int(text) if text.isdecimal() else 0
