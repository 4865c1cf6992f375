"""`distllm train`: how many ranks there are to be, whether this process starts them or is one, and the life of a rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distllm.config.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_OK, ConfigError, DistllmError
from distllm.faults import describe, tell_of_rank
from distllm.launch.devices import has_driver
from distllm.launched import report_end, requests_held, show_log, tried_first, world_size

if TYPE_CHECKING:
    from distllm.config.load import Loaded
    from distllm.config.schema import Config


def start(loaded: Loaded, argv: list[str], *, processes: int | None, show: bool) -> int:
    """Train here: as a rank of a launcher's, alone, or by starting ranks on this machine.

    Args:
        loaded: a config that has passed `check` without a number of ranks.
        argv: what follows `distllm` in the command of each rank.
        processes: how many ranks; None takes what the launcher, the layout and the devices say.
        show: print the commands that would run, and run nothing.

    Returns:
        The exit code.

    Raises:
        ConfigError: the config does not go with that number of ranks.
    """
    from distllm import launch
    from distllm.config.check import check, ranks_for

    inherited = world_size()
    count = inherited or processes or ranks_for(loaded.config, devices=_local_devices(loaded.config))
    if inherited is not None and processes not in (None, inherited):
        raise ConfigError([f"--processes={processes}: a launcher has already started {inherited} (WORLD_SIZE); leave it out"])
    problems = check(loaded.config, world_size=count)
    if problems:
        raise ConfigError(problems)
    if show:
        print("\n".join(launch.local_commands(argv, 1 if inherited else count)))
        return EXIT_OK
    if inherited is not None or count == 1:
        return run_train(loaded)
    return launch.local_ranks(argv, count)


def run_train(loaded: Loaded) -> int:
    """Train as this rank of the world that the environment describes; errors are told here, once over all ranks.

    Args:
        loaded: a config that has passed `check`.

    Returns:
        The exit code. A rank of many does not return: it leaves the process with that code.
    """
    show_log()
    with requests_held():  # before torch is imported: a request that comes early is obeyed after the first step
        return _run_rank(loaded)


def _run_rank(loaded: Loaded) -> int:
    from distllm import comm
    from distllm.jobs import mark
    from distllm.train.build import build
    from distllm.train.loop import train as train_loop
    from distllm.train.signals import hold_sigterm
    from distllm.watch.watch import Watch

    config, lines, began = loaded.config, [], False
    folder = Path(config.out) / config.name
    try:
        world = comm.start(config.device, timeout_s=config.train.timeout_s)
    except DistllmError:
        raise
    except ValueError as error:  # a device that this machine does not have
        raise ConfigError([str(error)]) from error
    watch = Watch(
        world, lost_s=config.train.lost_s, stall_s=config.train.stall_s,
        leaving=lambda: report_end(code=EXIT_LOST, lines=["lost another rank"]),
    )  # fmt: skip
    if world.size > 1:
        hold_sigterm(world.place)
    try:
        tried_first(world, shared=Path(config.out))
        run = build(config, world)
        mark(folder, "running", world=world)
        began = True
        code = train_loop(run)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BaseException as error:  # DCP's CheckpointException is no Exception
        lines = describe(error)[0]
        code = tell_of_rank(error, watch, world=world, debug="--debug" in sys.argv)
    watch.stop()
    if began:  # what was refused may name a folder that holds another run
        mark(folder, "ended", world=world, code=code)
    report_end(code=code, lines=lines)
    comm.stop(world, code=code)
    return code


def _local_devices(config: Config) -> int:
    """The accelerators of this machine; torch is asked only where a driver is."""
    if config.device == "cpu" or not has_driver():
        return 0
    import torch

    return torch.cuda.device_count()
