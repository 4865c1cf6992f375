"""The command line of `distllm launch`: its options, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from distllm.config.errors import ConfigError
from distllm.launch.words import told
from distllm.options import ConfigFile, Overrides


def launch(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    on: Annotated[str, typer.Option(help="Where: local (this machine), ssh or slurm.")] = "local",
    by: Annotated[
        str, typer.Option("--with", help="By what: torchrun, deepspeed, accelerate or (slurm) srun.")
    ] = "torchrun",
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; else the number of hosts, or 1.")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a machine, one a GPU; else as the layout says.")
    ] = None,
    command: Annotated[
        str, typer.Option(help="What the job does: train or bench; bench's own options come last, behind --.")
    ] = "train",
    show: Annotated[bool, typer.Option("--print", help="Print the script that would run, and run nothing.")] = False,
    hosts: Annotated[str, typer.Option(help="For ssh: the nodes, such as n1,n2 or me@n[01-04].")] = "",
    hostfile: Annotated[Path | None, typer.Option(help="For ssh: a file with a line `node1 slots=8` a node.")] = None,
    address: Annotated[str, typer.Option(help="For ssh: where the ranks meet; else the first host's name.")] = "",
    port: Annotated[int, typer.Option(min=0, help="For ssh: the port of the meeting point; 0 takes a free one.")] = 0,
    interface: Annotated[
        str, typer.Option(help="The interface of gloo and NCCL; else the one toward the first node.")
    ] = "",
    forward: Annotated[
        list[str] | None, typer.Option(help="The name of one more variable that the ranks may see.")
    ] = None,
    python: Annotated[str, typer.Option(help="The Python of the nodes; else this one.")] = sys.executable,
    preflight: Annotated[bool, typer.Option(help="Try versions, network and shared folder before training.")] = True,
    partition: Annotated[str, typer.Option(help="For slurm, as the following.")] = "",
    account: Annotated[str, typer.Option()] = "",
    qos: Annotated[str, typer.Option()] = "",
    time: Annotated[
        str, typer.Option(help="The limit of an attempt, such as 12:00:00; the job goes on in the next.")
    ] = "",
    cpus: Annotated[int, typer.Option(min=0, help="CPU cores of a rank.")] = 0,
    lead: Annotated[int, typer.Option(min=1, max=65535, help="Seconds before the limit at which the run saves.")] = 180,
    attempts: Annotated[
        int, typer.Option(min=1, help="Attempts without a new checkpoint after which the job stops.")
    ] = 3,
    sweep: Annotated[list[str] | None, typer.Option(help="A job array: key=value,value; several make a grid.")] = None,
    at_once: Annotated[int, typer.Option(min=0, help="Runs of the array at the same time; 0 is all.")] = 0,
    slurm: Annotated[list[str] | None, typer.Option(help="One more option of sbatch: constraint=a100.")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run the Python code that a run folder's config names.")
    ] = False,
) -> int:
    """Start the same training, or a bench, on many devices: by torchrun, deepspeed, accelerate or srun, here, by ssh or SLURM."""
    from distllm.launch.command import Asked
    from distllm.launch.command import launch as start
    from distllm.launch.job import Slurm

    more = tuple((key, value) for key, _, value in (text.partition("=") for text in slurm or []))
    words = overrides or []
    values = _values_of_bench(context, [str(config), *words]) if command == "bench" else _values_of_train(words)
    given = Slurm(
        partition=partition, account=account, qos=qos, time=time, cpus=cpus, lead_s=lead, attempts=attempts, at_once=at_once,
        options=more,
    )  # fmt: skip
    asked = Asked(
        on, by, nodes, gpus, hosts, hostfile, address, port, interface, tuple(forward or ()), python, preflight,
        tuple(sweep or ()), given, command, tuple(words),
    )  # fmt: skip
    return start(config, values, asked, show=show, debug="--debug" in sys.argv, trust=trust)


def _values_of_train(words: list[str]) -> list[str]:
    """The `key=value` words; a training has no options here."""
    option = next((word for word in words if word.startswith("-")), None)
    if option is not None:
        rule = "is no key=value, and only --command bench takes options behind --"
        raise ConfigError([f"{told(option)}: {rule}; nearest: leave it out"])
    return words


def _values_of_bench(context: typer.Context, words: list[str]) -> list[str]:
    """Read the command line of a bench as bench itself will, so that what is wrong is told before a job waits in a queue.

    Args:
        context: of `distllm launch`; its parent knows the command bench.
        words: what follows `bench`.

    Returns:
        The `key=value` words among them.

    Raises:
        ConfigError: an option, or a key of the grid, has a value that cannot be.
    """
    from distllm.bench.asked import options_of
    from distllm.bench.cells import configs_of

    parent = context.parent
    bench = getattr(parent, "command").get_command(parent, "bench")  # noqa: B009 (a group's, which the type does not say)
    given = bench.make_context("bench", words, parent=parent).params
    options = options_of(
        grid=given["grid"] or [], steps=given["steps"], warmup=given["warmup"], data=given["data"], against=given["against"],
        rounds=given["rounds"], compare=given["compare"], timeout_s=given["timeout"],
    )  # fmt: skip
    values = list(given["overrides"] or [])
    configs_of(given["config"], values, options.points)
    return values
