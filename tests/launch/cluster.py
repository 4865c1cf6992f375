"""A real SLURM of two virtual nodes on this machine: two slurmd under one controller, with munge between them."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
CONF = """
ClusterName=distllm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
SlurmdTimeout=120
SlurmctldTimeout=30
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=40
PartitionName=high Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "a SLURM of one's own needs root"


class Cluster:
    """The running cluster; its commands go through `run`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Run a client command with a time limit: with a node down, some wait for ever."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=30, check=False, cwd=cwd
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """A job's state; empty when the controller has forgotten it."""
        return self.run("squeue", "-h", "-j", job, "-t", "all", "-o", "%T", check=False).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What the controller says of a job."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job, "-o").split() if "=" in word)

    def wait(self, job: str, *states: str, limit_s: float = 120.0) -> str:
        """Wait until a job is in one of the states."""
        deadline = time.monotonic() + limit_s
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {states}"
            time.sleep(0.2)
        return state

    def requeued(self, job: str, *, restarts: int, limit_s: float = 100.0) -> None:
        """Wait until a job is requeued for the n-th time, and nothing of the attempt before is left.

        SLURM itself lets two minutes pass before it starts the job again. Who starts it earlier must know that the old batch
        script is gone: its end would be taken for that of the new one.
        """
        deadline = time.monotonic() + limit_s
        while (facts := self.facts(job)) and (facts["JobState"], facts["Restarts"]) != ("PENDING", str(restarts)):
            assert time.monotonic() < deadline, f"job {job} is {facts['JobState']} after {facts['Restarts']} restarts"
            time.sleep(0.2)
        while left := self.steps_of(job):
            assert time.monotonic() < deadline, f"job {job} is requeued, and there is still {left}"
            time.sleep(0.2)
        self.both_idle()
        time.sleep(2.0)  # a node refuses what was allowed in the second in which it ended the old attempt: "already killed"

    def start(self, job: str, *, limit_s: float = 60.0) -> None:
        """Start a requeued job at once; again and again, because SLURM sets the time once more when the old attempt has ended."""
        deadline = time.monotonic() + limit_s
        while self.facts(job)["JobState"] == "PENDING":
            assert time.monotonic() < deadline, f"job {job} stays PENDING"
            self.run("scontrol", "update", f"jobid={job}", "starttime=now", check=False)
            time.sleep(0.5)

    def processes(self) -> Iterator[psutil.Process]:
        """What this cluster has started, and no other on this machine."""
        for process in psutil.process_iter(["cmdline", "environ"]):
            if (process.info["environ"] or {}).get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                yield process

    def kill_node(self, name: str, *, whole: bool) -> None:
        """Kill a node's daemon and the tasks there, at once; as a `whole` node also those that would tell of the tasks' ends."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        for process in self.processes():
            if process.info["environ"].get("SLURMD_NODENAME") == name:
                with suppress(psutil.NoSuchProcess):
                    parent = process.parent()
                    if whole and parent is not None and parent.name().startswith("slurmstepd"):
                        parent.kill()
                    process.kill()

    def steps_of(self, job: str) -> list[str]:
        """What still runs of a job, as the step daemons call themselves: `slurmstepd: [3.batch]`."""
        titles = [" ".join(process.info["cmdline"] or ()) for process in self.processes()]
        return [title for title in titles if title.startswith("slurmstepd") and f"[{job}." in title]

    def revive_node(self, name: str) -> None:
        """Start a node's daemon again."""
        self.daemons[name] = _daemon(["slurmd", "-D", "-N", name], self)

    def clear(self) -> None:
        """End all jobs, and wait until both nodes are free."""
        self.run("scancel", "--user=root", check=False)
        self.both_idle()

    def both_idle(self) -> None:
        """Wait until no node is in use or down, or has yet to answer (`idle*`)."""
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split() != ["idle", "idle"]:
            assert time.monotonic() < deadline, self.run("sinfo", check=False)
            time.sleep(0.2)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons in the foreground, wait until both nodes are idle, and stop them at the end."""
    for name in ("state", "log", "spool/node1", "spool/node2"):
        (folder / name).mkdir(parents=True)
    ports = _free_ports(3)
    host = socket.gethostname().partition(".")[0]
    text = CONF.format(host=host, folder=folder, port=ports[0], port1=ports[1], port2=ports[2])
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    folder.chmod(0o700)
    found = Cluster(folder)
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", *munge, f"--socket={folder}/munge.sock"], ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "node1"], ["slurmd", "-D", "-N", "node2"],
    ]  # fmt: skip
    daemons = found.daemons
    try:
        for command in commands:
            daemons[command[-1] if command[0] == "slurmd" else command[0]] = _daemon(command, found)
            if command[0] == "munged":
                _until(lambda: (folder / "munge.sock").exists())
        _until(lambda: found.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False).strip() == "2", 30.0)
        yield found
        found.run("scancel", "--user=root", check=False)
        _until(lambda: not found.run("squeue", "-h", check=False).strip(), 40.0)
    finally:
        for daemon in reversed(daemons.values()):
            daemon.terminate()
        for daemon in reversed(daemons.values()):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in found.processes():  # steps of a test that failed
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _daemon(command: list[str], found: Cluster) -> subprocess.Popen[bytes]:
    with (found.folder / "log" / "daemons.log").open("ab") as log:
        clean = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST", "WANDB"))}
        return subprocess.Popen(command, env=clean | found.environment, stdout=log, stderr=log, process_group=0)


def _until(happened: object, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the cluster does not come up"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
