"""The command of one node, for each launcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distllm.launch.job import Job
from distllm.launch.words import joined


@dataclass(frozen=True)
class Place:
    """Where a node's launcher stands. Plain words for a process, shell words in a script."""

    node: str
    """The number of the node, from 0."""
    address: str
    port: str
    folder: str
    """The launch's folder, which every node sees; the hostfile is in it."""
    meet: str
    """For one node: the folder of files in which its ranks meet."""


def command(job: Job, place: Place, *, words: tuple[str, ...] | None = None) -> list[str]:
    """The argv that starts the ranks of one node.

    Args:
        job: the job.
        place: the node.
        words: what follows `distllm`; the job's own if None.
    """
    return _COMMANDS[job.by](job, place, job.words if words is None else words)


def hostfile(job: Job) -> str:
    """The hostfile of DeepSpeed: a line for each node with its number of ranks."""
    names = [host.rpartition("@")[2] for host in job.hosts] or ["localhost"]
    return "".join(f"{name} slots={job.ranks}\n" for name in names)


def _torchrun(job: Job, place: Place, words: tuple[str, ...]) -> list[str]:
    argv = [job.python, "-m", "torch.distributed.run", f"--nnodes={job.nodes}", f"--nproc-per-node={job.ranks}"]
    if job.nodes == 1:
        argv += [
            "--rdzv-backend=c10d",
            joined("--rdzv-endpoint=", place.meet, "/agents"),
            "--rdzv-conf=store_type=file",
        ]
    else:
        argv += [joined("--node-rank=", place.node), joined("--master-addr=", place.address)]
        argv += [joined("--master-port=", place.port)]
    return [*argv, "--max-restarts=0", "-m", "distllm", *words]


def _accelerate(job: Job, place: Place, words: tuple[str, ...]) -> list[str]:
    argv = [job.python, "-m", "accelerate.commands.launch"] + ["--multi_gpu"] * (job.size > 1)
    argv += [f"--num_processes={job.size}", f"--num_machines={job.nodes}"]
    if job.nodes == 1:
        argv += ["--main_process_port=0", "--rdzv_backend=c10d", "--rdzv_conf=store_type=file"]
    else:
        argv += [joined("--machine_rank=", place.node), joined("--main_process_ip=", place.address)]
        argv += [joined("--main_process_port=", place.port), "--same_network", "--rdzv_backend=static"]
    return [*argv, "--mixed_precision=no", "--dynamo_backend=no", "--max_restarts=0", "--module", "distllm", *words]


def _deepspeed(job: Job, place: Place, words: tuple[str, ...]) -> list[str]:
    argv = [job.python, "-m", "deepspeed.launcher.runner", "--quiet", "--no_ssh"]
    argv.append(joined("--hostfile=", place.folder, "/hostfile"))
    argv += [joined("--node_rank=", place.node), joined("--master_addr=", place.address)]
    argv.append(joined("--master_port=", place.port))
    return [*argv, "--no_local_rank", "--module", "distllm", *words]


def _srun(job: Job, place: Place, words: tuple[str, ...]) -> list[str]:
    return [job.python, "-m", "distllm", *words]


_COMMANDS: dict[str, Callable[[Job, Place, tuple[str, ...]], list[str]]] = {
    "torchrun": _torchrun, "accelerate": _accelerate, "deepspeed": _deepspeed, "srun": _srun,
}  # fmt: skip
