"""What a launcher's environment says about this process: who it is among how many, and where the ranks meet.

torchrun and accelerate set RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; the deepspeed launcher sets LOCAL_SIZE in
place of the last; srun and mpirun have names of their own, and set no RANK. A process that a launcher started beside
others, and that would train by itself all the same, is refused. The lowest floor: torch is not needed here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from distllm.node_names import expand, tasks_of

_STEP_LIMIT = 0xFFFFFF00
"""SLURM numbers the steps that are no srun (batch script, salloc's shell) from about here on."""
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)  # Open MPI; MPICH and Intel MPI


@dataclass(frozen=True)
class RankFacts:
    """One rank of a launched job."""

    launcher: str
    """Who said so: distllm, torchrun, deepspeed, env (RANK and WORLD_SIZE by hand), srun, mpirun."""
    rank: int
    size: int
    local_rank: int
    local_size: int
    meet: str
    """torch's init_method: a file, or the address in MASTER_ADDR and MASTER_PORT."""
    address: str
    port: int

    @property
    def agent_store(self) -> bool:
        """Whether the launcher itself holds the store that the ranks meet in (torchrun)."""
        return self.launcher == "torchrun"


def rank_facts(environment: Mapping[str, str] = os.environ) -> RankFacts | None:
    """The facts of this rank; None where no launcher has started it.

    Args:
        environment: variables by name.

    Raises:
        ValueError: the variables contradict each other, or a launcher started several processes that would each train
            by itself; one line that says what to do.
    """
    e = environment
    facts: RankFacts | None
    if "WORLD_SIZE" in e:
        facts = _spelled_out(e)
    elif _step_tasks(e) > 1:
        facts = _from_slurm(e)
    else:
        facts = _from_mpi(e)
    _refuse_fewer(e, facts.size if facts is not None else 1)
    return facts


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """The name of this node: SLURM's, where several may share a machine, else the host's."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def _spelled_out(e: Mapping[str, str]) -> RankFacts:
    """RANK and WORLD_SIZE: torchrun, accelerate, deepspeed, distllm's own launcher, or by hand."""
    size = _number(e, "WORLD_SIZE", least=1, remedy="unset WORLD_SIZE")
    if size > 1 and not e.get("RANK", "").isdecimal():
        raise ValueError(
            f"WORLD_SIZE={size}: is set, but RANK is not; nearest: unset WORLD_SIZE, or start with torchrun"
        )
    rank = _number(e, "RANK", default=0)
    if rank >= size:
        raise ValueError(f"RANK={rank}: must be below WORLD_SIZE={size}; nearest: {size - 1}")
    local_size = _number(e, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=1, least=1)
    local_rank = _number(e, "LOCAL_RANK", "SLURM_LOCALID", default=0)
    file = e.get("DISTLLM_INIT_METHOD", "")
    if "TORCHELASTIC_RUN_ID" in e:
        launcher = "torchrun"
    elif "CROSS_SIZE" in e:
        launcher = "deepspeed"
    else:
        launcher = "distllm" if file else "env"
    address, port = e.get("MASTER_ADDR", "127.0.0.1"), _number(e, "MASTER_PORT", default=29500)
    return RankFacts(launcher, rank, size, local_rank, local_size, file or "env://", address, port)


def _from_slurm(e: Mapping[str, str]) -> RankFacts:
    """A task of srun; where the sbatch script names no meeting point, the step's first node and a port of its own."""
    size, rank = _step_tasks(e), _number(e, "SLURM_PROCID")
    nodes = expand(e.get("SLURM_STEP_NODELIST") or e.get("SLURM_JOB_NODELIST") or "localhost")
    tasks = tasks_of(e.get("SLURM_STEP_TASKS_PER_NODE") or e.get("SLURM_TASKS_PER_NODE") or f"{size}(x{len(nodes)})")
    node = _number(e, "SLURM_NODEID", default=0)
    local_size = tasks[node] if node < len(tasks) else size // len(nodes)
    job, step = _number(e, "SLURM_JOB_ID", default=0), _number(e, "SLURM_STEP_ID", default=0)
    address = e.get("MASTER_ADDR") or ("127.0.0.1" if len(nodes) == 1 else nodes[0])
    port = _number(e, "MASTER_PORT", default=20000 + (job * 31 + step) % 12000)
    meet = e.get("DISTLLM_INIT_METHOD") or "env://"
    return RankFacts("srun", rank, size, _number(e, "SLURM_LOCALID", default=0), local_size, meet, address, port)


def _from_mpi(e: Mapping[str, str]) -> RankFacts | None:
    for rank, size, local_rank, local_size in _MPI:
        if _number(e, size, default=1) < 2:
            continue
        world, local = _number(e, size), _number(e, local_size, default=1)
        if local < world and "MASTER_ADDR" not in e:
            raise ValueError(
                f"{size}={world}: mpirun started ranks on several nodes, and MASTER_ADDR does not say where they meet; "
                "nearest: mpirun -x MASTER_ADDR=FIRST_NODE -x MASTER_PORT=29500"
            )
        return RankFacts(
            "mpirun", _number(e, rank), world, _number(e, local_rank, default=0), local, "env://",
            e.get("MASTER_ADDR", "127.0.0.1"), _number(e, "MASTER_PORT", default=29500),
        )  # fmt: skip
    return None


def _refuse_fewer(e: Mapping[str, str], size: int) -> None:
    """Refuse to be one of several trainings of the same config that know nothing of each other."""
    wanted = _number(e, "DISTLLM_RANKS", default=0)
    if wanted not in (0, size):
        raise ValueError(
            f"DISTLLM_RANKS={wanted}: the job was planned for {wanted} ranks and this process is in a world of {size}, so the "
            "launcher started another number, or processes that know nothing of each other (accelerate launch --cpu does); "
            f"nearest: start {wanted} ranks, or unset DISTLLM_RANKS"
        )
    tasks = _step_tasks(e)
    agents = _number(e, "GROUP_WORLD_SIZE", default=tasks)  # torchrun's name for its nodes
    if size < tasks or agents < tasks:
        what = f"a world of {size}" if size < tasks else f"a torchrun of {agents} node{'s' if agents > 1 else ''}"
        raise ValueError(
            f"SLURM_NTASKS={tasks}: srun started {tasks} tasks, but this one is in {what}, so each would train by itself; "
            "nearest: torchrun --nnodes=$SLURM_NNODES --node-rank=$SLURM_NODEID, or srun with one task"
        )


def _step_tasks(e: Mapping[str, str]) -> int:
    """The tasks of the srun step that this process is in; 0 outside of one, as in a batch script."""
    step = e.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= _STEP_LIMIT:
        return 0
    return _number(e, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1)


def _number(e: Mapping[str, str], *names: str, default: int | None = None, least: int = 0, remedy: str = "") -> int:
    """The first of these variables that is set, as a whole number."""
    for name in names:
        if name in e:
            if not e[name].isdecimal() or int(e[name]) < least:
                rule = "must be a whole number" + (f" above {least - 1}" if least else "")
                raise ValueError(f"{name}={e[name]}: {rule}; nearest: {remedy or f'unset {name}'}")
            return int(e[name])
    if default is None:
        raise ValueError(f"{names[0]}: is not set, though its launcher's other variables are; nearest: unset those too")
    return default
