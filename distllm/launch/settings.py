"""The environment of the ranks: what is set and why, and which variables of the user's are let through."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distllm.launch.job import Job
from distllm.launch.words import VARIABLE, joined

ALLOWED = frozenset((
    "PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "HOME", "USER", "LANG", "LC_ALL",
    "TMPDIR", "SLURM_CONF", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "NETRC",
))  # fmt: skip
ALLOWED_PREFIXES = (
    "WANDB_",
    "HF_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "TRANSFORMERS_",
    "UCX_",
    "FI_",
    "MALLOC_",
)
"""What programs of a training read. WANDB_API_KEY and HF_TOKEN are among them: they travel as variables, by name."""
_NOT_FORWARDED = frozenset(("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SERVICE", "WANDB__SERVICE"))
"""Of the process that launches, not of the job: with them a job would write into another run."""


@dataclass(frozen=True)
class Setting:
    """A variable that every rank gets."""

    name: str
    value: str
    why: str


def forwarded(environment: Iterable[str], extra: Iterable[str] = ()) -> tuple[str, ...]:
    """The names of the variables that travel to the ranks.

    Args:
        environment: the names that are set here.
        extra: further names that the user asks for.
    """
    passes = {n for n in environment if n in ALLOWED or n.startswith(ALLOWED_PREFIXES)} - _NOT_FORWARDED
    return tuple(sorted({name for name in passes if VARIABLE.fullmatch(name)} | set(extra)))


def settings(job: Job, *, folder: str, meet: str, master: tuple[str, str] | None) -> list[Setting]:
    """What is set for the ranks of a job, each with its reason.

    Args:
        job: the job.
        folder: the launch's folder, or the shell word for it.
        meet: for one node: the folder of files in which its ranks meet, or the shell word for it.
        master: address and port where the ranks of several nodes meet; None where a script finds them out.
    """
    found = [
        Setting(
            "DISTLLM_RANKS", str(job.size), "a launcher that starts another number, or single processes, is refused"
        ),
        Setting(
            "DISTLLM_LAUNCH", folder, "each rank writes here how it ended, so that the first failure is told first"
        ),
    ]
    if job.preflight:
        found.append(
            Setting("DISTLLM_PREFLIGHT", "1", "versions, an all-reduce and the shared folder are tried before training")
        )
    if job.nodes == 1:
        file = joined("file://", meet, "/store")
        found.append(Setting("DISTLLM_INIT_METHOD", file, "the ranks meet in a file: no port is opened"))
    elif master is not None:
        found.append(Setting("MASTER_ADDR", master[0], "the first node, where the ranks meet"))
        found.append(Setting("MASTER_PORT", master[1], "a port of it that was free just now"))
    if job.on != "slurm":
        found.append(Setting("OMP_NUM_THREADS", str(job.threads), "the cores of a node, shared by its ranks"))
    return found + _network(job) + _launcher(job, meet)


def _network(job: Job) -> list[Setting]:
    """Interfaces and what the network libraries say; NCCL's only where there are GPUs."""
    found = []
    if job.nodes == 1:
        found.append(Setting("GLOO_SOCKET_IFNAME", "lo", "gloo's connections stay on this machine"))
    elif job.interface:
        found.append(Setting("GLOO_SOCKET_IFNAME", job.interface, "the interface that was asked for"))
    if job.device != "cuda":
        return found
    if job.nodes == 1:
        found.append(
            Setting("NCCL_SOCKET_IFNAME", "lo", "NCCL's first contact stays on this machine; data goes over NVLink")
        )
    elif job.interface:
        found.append(Setting("NCCL_SOCKET_IFNAME", job.interface, "the interface that was asked for"))
    else:
        found.append(Setting("NCCL_SOCKET_IFNAME", "^lo,docker,virbr", "never those that lead to no other node"))
    return [
        *found,
        Setting("NCCL_DEBUG", "WARN", "a failure of the network names its cause; nothing else is said"),
        Setting(
            "TORCH_NCCL_ASYNC_ERROR_HANDLING", "3", "a hung collective ends its rank, and a broken one never goes on"
        ),
        Setting("TORCH_FR_BUFFER_SIZE", "2000", "the last 2,000 collectives are remembered"),
        Setting(
            "TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "and written down when one times out: it names the rank that is missing"
        ),
    ]


def _launcher(job: Job, meet: str) -> list[Setting]:
    """What the launchers themselves need."""
    found = []
    if job.by in ("torchrun", "accelerate"):
        found.append(
            Setting("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600", "the agent lets ranks save for so many seconds, not 30")
        )
        if job.nodes == 1:
            why = "the agent opens no port either"
            found.append(Setting("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1", why))
    if job.by == "accelerate":
        if job.nodes == 1:
            why = "the file in which accelerate's torchrun meets itself"
            found.append(Setting("PET_RDZV_ENDPOINT", joined("", meet, "/agents"), why))
        if job.device == "cpu":
            found.append(Setting("ACCELERATE_USE_CPU", "true", "without it, accelerate looks for GPUs"))
    if job.by == "deepspeed" and job.device == "cpu":
        found.append(Setting("DS_ACCELERATOR", "cpu", "DeepSpeed does not look for GPUs"))
    return found
