"""`distllm launch`: the command line -> one job -> printed, or started."""

from __future__ import annotations

import difflib
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distllm.config.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED, ConfigError
from distllm.config.machine import cores
from distllm.config.places import make_folder
from distllm.launch.commands import Place, command, hostfile
from distllm.launch.devices import local_gpus
from distllm.launch.family import Request, run_family
from distllm.launch.hosts import read_hostfile, read_hosts
from distllm.launch.job import COMMANDS, LAUNCHERS, PLACES, Job, Slurm, problems
from distllm.launch.reports import outcome, read_reports
from distllm.launch.sbatch import sbatch_script
from distllm.launch.script import local_script, ssh_script
from distllm.launch.settings import forwarded, settings
from distllm.launch.slurm import submit
from distllm.launch.ssh import SSH, address_of, run_ssh
from distllm.launch.sweep import grid
from distllm.launch.words import VARIABLE, told

if TYPE_CHECKING:
    from distllm.config.schema import Config

_MODULES = {"torchrun": "torch", "deepspeed": "deepspeed", "accelerate": "accelerate"}


@dataclass(frozen=True)
class Asked:
    """The options of the command line, as they were given."""

    on: str = "local"
    by: str = "torchrun"
    nodes: int | None = None
    gpus: int | None = None
    hosts: str = ""
    hostfile: Path | None = None
    address: str = ""
    port: int = 0
    interface: str = ""
    forward: tuple[str, ...] = ()
    python: str = sys.executable
    preflight: bool = True
    sweep: tuple[str, ...] = ()
    slurm: Slurm = field(default_factory=Slurm)
    command: str = "train"
    words: tuple[str, ...] = ()
    """What follows the config: `key=value` each, and of a bench its options."""


def launch(config: Path, overrides: list[str], asked: Asked, *, show: bool, debug: bool, trust: bool) -> int:
    """Print or start the job.

    Args:
        config: the config's file, or a run folder.
        overrides: `key=value` each.
        asked: the options.
        show: print what would run, and run nothing.
        debug: give --debug to the ranks.
        trust: give --trust to the ranks.

    Returns:
        The exit code of the job; of SLURM, 0 when it is queued.

    Raises:
        ConfigError: all that is wrong with the config, the options or this machine; nothing has been started.
    """
    words = [asked.command, str(config), *(asked.words or overrides)] + ["--trust"] * trust + ["--debug"] * debug
    job = _job(config, overrides, asked, words=tuple(words))
    if show:
        print(text_of(job), end="")
        return EXIT_OK
    found = _machine(job)
    if found:
        raise ConfigError(found)
    if job.on == "slurm":
        return _submit(job)
    return run_ssh(job) if job.on == "ssh" else run_local(job)


def text_of(job: Job) -> str:
    """What `--print` shows: the script for sbatch, or one for bash."""
    if job.on == "slurm":
        return sbatch_script(job)
    if job.on == "ssh":
        return ssh_script(job, ssh=SSH, address=address_of(job), port=str(job.port or 29500))
    return local_script(job)


def run_local(job: Job) -> int:
    """Run the job on this machine and wait for it; returns the exit code of the rank that failed first."""
    make_folder(Path(job.out), key="out", value=job.out, near="runs")
    with tempfile.TemporaryDirectory(prefix="distllm-") as folder:
        place = Place("0", "127.0.0.1", "29500", folder, folder)
        found = {s.name: s.value for s in settings(job, folder=folder, meet=folder, master=None)}
        if job.by == "deepspeed":
            Path(folder, "hostfile").write_text(hostfile(job), encoding="utf-8")
        request = Request(saves=job.resumes)
        with request.caught():
            code = run_family(command(job, place), environment=os.environ | found, request=request)
        if code == EXIT_INTERRUPTED:
            return code
        if request.stop.is_set() and not job.resumes:
            return EXIT_INTERRUPTED
        code, lines = outcome(read_reports(Path(folder)), code=code, size=job.size)
    for line in lines:
        print(f"distllm: {line}", file=sys.stderr, flush=True)
    if code == EXIT_STOPPED:
        print("distllm: stopped after saving; the same command continues", file=sys.stderr, flush=True)
    return code


def _job(config: Path, overrides: list[str], asked: Asked, *, words: tuple[str, ...]) -> Job:
    """The checked job: the options, the config and all runs of a sweep are looked at before anything else."""
    from distllm.config.load import load

    _refuse_unknown(asked)
    bad = [p for word in words for p in problems(Job("a", "runs", (word,), "local", "torchrun"))]
    if bad:
        raise ConfigError(bad)
    loaded = load(config, overrides)
    hosts, slots = _hosts(asked)
    nodes = asked.nodes or len(hosts) or 1
    trains = asked.command == "train"
    name = loaded.config.name + ("" if trains else f"-{asked.command}")
    runs = grid(list(asked.sweep))
    if runs and asked.on != "slurm":
        raise ConfigError(
            [f"--sweep={told(asked.sweep[0])}: is an array of jobs, not --on {asked.on}; nearest: --on slurm"]
        )
    ranks = _ranks(loaded.config, asked, nodes=nodes, slots=slots)
    job = Job(
        name, loaded.config.out, words, asked.on, asked.by, nodes=nodes, ranks=ranks,
        device=_device(loaded.config, asked.on), python=asked.python, threads=max(1, cores() // ranks), hosts=hosts,
        address=asked.address, port=asked.port, interface=asked.interface,
        forward=() if asked.on == "local" else forwarded(os.environ, [n for n in asked.forward if VARIABLE.fullmatch(n)]),
        folder=os.getcwd() if asked.on == "ssh" else "", preflight=asked.preflight and trains,
        slurm=replace(asked.slurm, sweep=runs),
    )  # fmt: skip
    wrong = [n for n in asked.forward if not VARIABLE.fullmatch(n)]
    found = problems(replace(job, forward=(*job.forward, *wrong)))
    found += _config_problems(config, overrides, runs, size=job.size if trains else None)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    return job


def _config_problems(config: Path, overrides: list[str], runs: tuple[tuple[str, ...], ...], *, size: int | None) -> list[str]:
    """What is wrong with the config for this number of ranks, if it is known; of a sweep, with that of every run."""
    from distllm.config.check import check
    from distllm.config.load import load

    found = []
    for run in runs or ((),):
        lines = check(load(config, [*overrides, *run]).config, world_size=size)
        found += [f"{line} ({' '.join(run)})" if run else line for line in lines]
    return found


def _refuse_unknown(asked: Asked) -> None:
    found = []
    given = (("--on", asked.on, PLACES), ("--with", asked.by, LAUNCHERS), ("--command", asked.command, COMMANDS))
    for key, value, known in given:
        if value not in known:
            near = (difflib.get_close_matches(value, known, n=1, cutoff=0.3) or known)[0]
            found.append(f"{key}={told(value)}: must be one of {', '.join(known)}; nearest: {near}")
    if (asked.hosts or asked.hostfile) and asked.on != "ssh":
        found.append(f"--hosts: is for --on ssh, and this is --on {told(asked.on)}; nearest: leave it out")
    if asked.sweep and asked.command == "bench":
        found.append(f"--sweep={told(asked.sweep[0])}: is of trainings; nearest: --command bench -- --grid")
    if asked.hosts and asked.hostfile:
        found.append("--hostfile: is another way to say --hosts; nearest: one of them")
    if found:
        raise ConfigError(found)


def _hosts(asked: Asked) -> tuple[tuple[str, ...], int | None]:
    if asked.hostfile is not None:
        return read_hostfile(asked.hostfile)
    return (read_hosts(asked.hosts), None) if asked.hosts else ((), None)


def _ranks(config: Config, asked: Asked, *, nodes: int, slots: int | None) -> int:
    """Ranks a node: as asked, as the hostfile has slots, as the layout spells out, else one a GPU of this machine."""
    from distllm.config.check import ranks_for

    given = asked.gpus or slots
    if given:
        return given
    spelled = ranks_for(config, devices=local_gpus() * nodes if config.device != "cpu" else 0)
    return max(1, -(-spelled // nodes))


def _device(config: Config, on: str) -> str:
    """cpu or cuda; `auto` is what this machine has, and on a cluster cuda, where the login node says nothing."""
    if config.device != "auto":
        return config.device
    return "cuda" if on == "slurm" or local_gpus() else "cpu"


def _machine(job: Job) -> list[str]:
    """What this machine lacks for the job."""
    found = []
    module = _MODULES.get(job.by)
    if module is not None and importlib.util.find_spec(module) is None:
        found.append(
            f"--with={job.by}: the package {module} is not installed; pip install {module}, or --with torchrun"
        )
    gpus = local_gpus()
    if job.on == "local" and shutil.which(job.python) is None:
        found.append(f"--python={told(job.python)}: there is no such program; nearest: {sys.executable}")
    if job.on == "local" and job.device == "cuda" and job.ranks > gpus:
        found.append(f"--gpus={job.ranks}: this machine has {gpus} GPUs; nearest: {max(1, gpus)}, or device=cpu")
    if job.on == "ssh" and shutil.which("ssh") is None:
        found.append("--on=ssh: there is no ssh on this machine; nearest: install openssh-client, or --on local")
    return found


def _submit(job: Job) -> int:
    number, script = submit(job)
    print(f"job      {number}")
    print(f"script   {script}")
    print(f"log      {job.name}-{number}" + ("_N.log" if job.slurm.sweep else ".log"))
    watch = f"distllm jobs {job.out}" if job.resumes else f"squeue -j {number}"
    print(f"next     {watch}; to stop it: scancel {number}")
    return EXIT_OK
