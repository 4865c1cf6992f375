"""What is to be launched: one description, from which every command, hostfile and script is rendered."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from distllm.launch.words import INTERFACE, SLURM_VALUE, VARIABLE, check_form, check_word, told
from distllm.node_names import NAME

PLACES = ("local", "ssh", "slurm")
LAUNCHERS = ("torchrun", "deepspeed", "accelerate", "srun")
COMMANDS = ("train", "bench")
_TIME = re.compile(r"\d{1,6}(:[0-5]?\d){0,2}|\d{1,4}-\d{1,2}(:[0-5]?\d){0,2}")
_LOGIN = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_.-]{0,63}@)?" + NAME.pattern)
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OWN = frozenset((
    "job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "output", "open-mode", "requeue",
    "no-requeue", "signal", "export", "array", "partition", "account", "qos", "time", "wrap", "parsable", "test-only", "chdir",
    "batch",
))  # fmt: skip
"""Options of sbatch that the script itself sets, or that would change what it means."""


@dataclass(frozen=True)
class Slurm:
    """What only SLURM has."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    """Limit of one attempt, in SLURM's words: minutes, hours:minutes:seconds, days-hours."""
    cpus: int = 0
    """CPU cores of one rank; 0 leaves it to the cluster."""
    lead_s: int = 180
    """Seconds before the time limit at which the ranks are asked to save."""
    attempts: int = 3
    """Attempts in a row without a new checkpoint after which the job stops."""
    sweep: tuple[tuple[str, ...], ...] = ()
    """The overrides of each run of a job array."""
    at_once: int = 0
    """Runs of the array at the same time; 0 is all."""
    options: tuple[tuple[str, str], ...] = ()
    """More options of sbatch by long name."""


@dataclass(frozen=True)
class Job:
    """One job: a training, or a bench."""

    name: str
    """The run's name, of a bench NAME-bench; its folder is OUT/NAME."""
    out: str
    words: tuple[str, ...]
    """What follows `distllm`: train CONFIG key=value..., or bench CONFIG key=value... --grid ..."""
    on: str
    by: str
    """The launcher."""
    nodes: int = 1
    ranks: int = 1
    """Ranks of one node: one a GPU."""
    device: str = "cpu"
    python: str = "python"
    threads: int = 1
    """OMP_NUM_THREADS of a rank, where the cores are known."""
    hosts: tuple[str, ...] = ()
    """For ssh: the nodes, the first of which holds the meeting point."""
    address: str = ""
    """Where the ranks of several nodes meet; empty: the first node's name."""
    port: int = 0
    """Its port; 0: a free one."""
    interface: str = ""
    """The network interface for gloo and NCCL; empty: the one that leads to `address`."""
    forward: tuple[str, ...] = ()
    """Names of the variables that reach the ranks; their values are read from the environment and never written."""
    folder: str = ""
    """For ssh: the working folder on every node."""
    preflight: bool = True
    slurm: Slurm = field(default_factory=Slurm)

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks

    @property
    def resumes(self) -> bool:
        """Whether another attempt goes on where this one ended. A bench saves nothing on its way."""
        return self.words[:1] != ("bench",)

    @property
    def launch_folder(self) -> str:
        """Where launches of this run keep scripts, logs and the words of each rank."""
        return str(PurePosixPath(self.out) / ".launch" / self.name)


def problems(job: Job) -> list[str]:
    """All that is wrong with a job, a line each; empty when it can be rendered."""
    found = _choices(job)
    found += check_form("name", job.name, _RUN, rule="letters, digits, dot, dash and underscore", near="run")
    for key, text, near in (
        ("out", job.out, "runs"),
        ("--python", job.python, "python3"),
        ("--folder", job.folder, "."),
    ):
        found += check_word(key, text, near=near)
    for word in job.words:
        found += check_word("argument", word, near="the same without it")
    for name in job.forward:
        rule = "the name of a variable alone: its value is taken from your environment and never written down"
        found += check_form(
            "--forward", name, VARIABLE, rule=rule, near=re.sub(r"\W.*", "", name, flags=re.DOTALL) or "HF_HOME"
        )
    for host in job.hosts:
        found += check_form("--hosts", host, _LOGIN, rule="host names, with user@ where needed", near="node1,node2")
    if job.address:
        found += check_form("--address", job.address, NAME, rule="a host name or an IPv4 address", near="10.0.0.1")
    if job.interface:
        ill = check_form("--interface", job.interface, INTERFACE, rule="a network interface", near="eth0")
        if not ill and job.nodes == 1:
            ill = [f"--interface={job.interface}: the ranks of one node meet on loopback; nearest: leave it out"]
        found += ill
    if not (job.port == 0 or 1024 <= job.port <= 65535):
        found.append(f"--port={job.port}: must be 1024 to 65535; nearest: {min(65535, max(1024, job.port))}")
    return found + (_slurm(job) if job.on == "slurm" else [])


def _choices(job: Job) -> list[str]:
    found = []
    if job.on == "local" and job.nodes != 1:
        found.append(f"--nodes={job.nodes}: --on local is this machine alone; nearest: 1, or --on ssh --hosts ...")
    if job.by == "srun" and job.on != "slurm":
        found.append(f"--with=srun: is SLURM's, and this is --on {job.on}; nearest: torchrun, or --on slurm")
    if job.on == "ssh" and not job.hosts:
        found.append("--hosts=: --on ssh needs the nodes; nearest: --hosts node1,node2 or --hostfile FILE")
    if job.on == "ssh" and job.hosts and len(job.hosts) != job.nodes:
        found.append(f"--nodes={job.nodes}: there are {len(job.hosts)} hosts; nearest: {len(job.hosts)}")
    if len(set(job.hosts)) != len(job.hosts):
        twice = next(host for host in job.hosts if job.hosts.count(host) > 1)
        found.append(f"--hosts={told(twice)}: is given twice; nearest: once, with more --gpus")
    return found


def _slurm(job: Job) -> list[str]:
    s, found = job.slurm, []
    rule = "made of letters, digits and ._/-, because sbatch reads it from an #SBATCH line"
    found += check_form("out", job.out, re.compile(r"[A-Za-z0-9_./-]{1,200}"), rule=rule, near="runs")
    for key in ("partition", "account", "qos"):
        if value := getattr(s, key):
            found += check_form(f"--{key}", value, SLURM_VALUE, rule=f"the name of a {key}", near="main")
    if s.time:
        found += check_form("--time", s.time, _TIME, rule="minutes, H:M:S or D-H:M:S", near="12:00:00")
    for key, value in s.options:
        if key in _OWN or not re.fullmatch(r"[a-z][a-z0-9-]{1,30}", key):
            why = "is set by its own option here" if key in _OWN else "is no option of sbatch"
            found.append(f"--slurm={told(key)}: {why}; nearest: --slurm constraint=a100")
        elif value:
            found += check_form(f"--slurm={key}", value, SLURM_VALUE, rule="without spaces and quotes", near="a100")
    for run in s.sweep:
        for word in run:
            found += check_word("--sweep", word, near="optim.lr=0.001,0.003")
    return found
