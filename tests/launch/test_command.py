"""`distllm launch`: what is refused in one line before anything starts, and the real launchers on this machine."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch

from distllm import cli
from distllm.comm import World
from distllm.launch import command
from tests.runs import losses, run_tiny, tiny_config

ROOT = Path(__file__).parents[2]
SAME = ("schedule.name=constant",)  # the learning rate of a step does not depend on how many there will be


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith(("SLURM_", "DISTLLM_")) or n in ("WORLD_SIZE", "RANK")]:
        monkeypatch.delenv(name)
    Path("run.yaml").write_text("name: a\ndevice: cpu\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--with torchrnu", "--with=torchrnu: must be one of torchrun, deepspeed, accelerate, srun; nearest: torchrun"),
        ("--on cluster", "--on=cluster: must be one of local, ssh, slurm; nearest: slurm"),
        ("--with srun", "--with=srun: is SLURM's, and this is --on local; nearest: torchrun, or --on slurm"),
        ("--nodes 2", "--nodes=2: --on local is this machine alone; nearest: 1, or --on ssh --hosts ..."),
        ("--on ssh", "--hosts=: --on ssh needs the nodes; nearest: --hosts node1,node2 or --hostfile FILE"),
        ("--on ssh --hosts n1,n2 --nodes 3", "--nodes=3: there are 2 hosts; nearest: 2"),
        ("--on ssh --hosts n1,n1", "--hosts=n1: is given twice; nearest: once, with more --gpus"),
        ("--hosts n1", "--hosts: is for --on ssh, and this is --on local; nearest: leave it out"),
        ("--on ssh --hosts n[1-", "--hosts=n[1-: node list 'n[1-': 'n[1-' does not parse; nearest: n[01-03,7]"),
        ("--on ssh --hostfile no.txt", "--hostfile=no.txt: No such file or directory; nearest: a file with a line `node1 slots=8` a node"),
        ("--on ssh --hostfile bad.txt", "bad.txt:2: 'node2 slots=x' does not parse; nearest: node1 slots=8"),
        ("--on ssh --hostfile twice.txt", "twice.txt:3: n1 is there twice; nearest: once, with more slots"),
        ("--on ssh --hostfile odd.txt", "odd.txt: every node must have the same number of slots, and n2 has another; nearest: one number"),
        ("--on ssh --hosts n1,n2 --port 80", "--port=80: must be 1024 to 65535; nearest: 1024"),
        ("--on slurm --time tomorrow", "--time=tomorrow: must be minutes, H:M:S or D-H:M:S; nearest: 12:00:00"),
        ("--on slurm --slurm nodes=4", "--slurm=nodes: is set by its own option here; nearest: --slurm constraint=a100"),
        ("--on slurm --sweep lr", "--sweep=lr: must be key=value,value; nearest: --sweep optim.lr=0.001,0.003"),
        ("--on slurm --sweep optim.lr=0.1,-1", "optim.lr=-1: must be a number above 0; nearest: 0.001"),
        ("--sweep optim.lr=0.1,1", "--sweep=optim.lr=0.1,1: is an array of jobs, not --on local; nearest: --on slurm"),
        ("--interface eth0", "--interface=eth0: the ranks of one node meet on loopback; nearest: leave it out"),
        ("--python no-such-python", f"--python=no-such-python: there is no such program; nearest: {sys.executable}"),
        ("--command bnech", "--command=bnech: must be one of train, bench; nearest: bench"),
        ("--command bench -- --grid layout.dp_shrad=1", "--grid=layout.dp_shrad=1: unknown key; nearest: layout.dp_shard"),
        ("--command bench -- --grid engine.name=native,natve", "engine.name=natve: must be one of native, deepspeed; nearest: native"),
        ("--command bench -- --gird layout.dp_shard=1", "No such option: --gird (Possible options: --grid); see distllm bench --help"),
        ("--command bench layout.dp_shrad=1 -- --steps 5", "layout.dp_shrad=1: unknown key; nearest: layout.dp_shard"),
        ("-- --grid a", "--grid: is no key=value, and only --command bench takes options behind --; nearest: leave it out"),
        ("--command bench --on slurm --sweep seed=1,2", "--sweep=seed=1,2: is of trainings; nearest: --command bench -- --grid"),
        ("train.stesp=1", "train.stesp=1: unknown key; nearest: train.steps"),
        ("--gpus 3 layout.dp_shard=2", "layout.dp_shard=2: dp_replicate 1 x dp_shard 2 = 2 must equal the 3 processes; nearest: layout.dp_shard=3"),
        ("--gpus 2 device=cuda", "--gpus=2: this machine has 0 GPUs; nearest: 1, or device=cpu"),
    ],
)
def test_what_is_refused(arguments: str, line: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad.txt").write_text("# nodes\nnode2 slots=x\n")
    Path("twice.txt").write_text("n1 slots=1\n\nn1 slots=1\n")
    Path("odd.txt").write_text("n1 slots=1\nn2 slots=2 # more\n")
    monkeypatch.setattr(command, "local_gpus", lambda: 0)
    monkeypatch.setattr(command, "run_family", lambda *a, **k: pytest.fail("something was started"))
    assert cli.run(["launch", "run.yaml", *arguments.split()]) == 2
    assert capsys.readouterr().err == f"distllm: {line}\n"
    assert {path.name for path in here.iterdir()} == {"run.yaml", "bad.txt", "twice.txt", "odd.txt"}


def test_without_sbatch_ssh_or_deepspeed(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    assert cli.run(["launch", "run.yaml", "--on", "slurm"]) == 2
    assert capsys.readouterr().err == "distllm: --on=slurm: there is no sbatch on this machine; nearest: a login node of the cluster, or --on local\n"
    assert cli.run(["launch", "run.yaml", "--on", "ssh", "--hosts", "n1"]) == 2
    assert capsys.readouterr().err == "distllm: --on=ssh: there is no ssh on this machine; nearest: install openssh-client, or --on local\n"
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert cli.run(["launch", "run.yaml", "--with", "deepspeed"]) == 2
    assert capsys.readouterr().err == "distllm: --with=deepspeed: the package deepspeed is not installed; pip install deepspeed, or --with torchrun\n"


def test_a_bench_is_launched_and_ends_when_asked(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    def family(argv: list[str], *, environment: dict[str, str], request: command.Request) -> int:
        seen.append((argv, environment))
        if len(seen) == 2:
            request.stop.set()
        return len(seen) - 1

    monkeypatch.setattr(command, "run_family", family)
    line = ["launch", "run.yaml", "train.steps=7", "--gpus", "2", "--command", "bench", "--", "--grid", "ranks=1,2 layout.dp_shard=auto"]
    assert [cli.run(line), cli.run(line)] == [0, 130]
    assert capsys.readouterr().err == "distllm: interrupted\n"
    argv, environment = seen[0]
    assert argv[argv.index("distllm") + 1 :] == ["bench", "run.yaml", "train.steps=7", "--grid", "ranks=1,2 layout.dp_shard=auto"]
    assert environment["DISTLLM_RANKS"] == "2" and "DISTLLM_PREFLIGHT" not in environment  # which bench does not have


def test_a_slurm_that_does_not_answer(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)' >&2\nexit 1\n")
    (here / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(here), prepend=os.pathsep)
    assert cli.run(["launch", "run.yaml", "--on", "slurm"]) == 2
    assert capsys.readouterr().err == (
        "distllm: --on=slurm: SLURM does not answer here (Batch job submission failed: Unable to contact slurm controller (connect failure)); "
        "nearest: sinfo, which shows whether it is up, or --on local\n"
    )


def test_nothing_heavy_is_imported(here: Path) -> None:
    for argv in (["launch", "--help"], ["launch", "run.yaml", "--print"], ["launch", "run.yaml", "--on", "slurm", "--print"], ["jobs", "."]):
        code = f"import sys; from distllm.cli import run; run({argv!r}); sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'deepspeed', 'accelerate')))"
        assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True).returncode == 0


@contextmanager
def launched(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`distllm launch` of a tiny run; whatever becomes of the test, nothing of it is left."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    line = [sys.executable, "-m", "distllm", "launch", "tiny.yaml", "layout.dp_replicate=2", "layout.dp_shard=1", *arguments]
    with subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as process:
        try:
            yield process
        finally:
            for end in (process.terminate, lambda: process.send_signal(signal.SIGINT), process.kill):  # save; end; be gone
                if process.poll() is None:
                    end()
                    with suppress(subprocess.TimeoutExpired):
                        process.communicate(timeout=5)


def left_behind(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cwd", "cmdline", "status"]):
        if process.info["cwd"] == str(folder) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(process.info["cmdline"] or []))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process, this one."""
    folder = tmp_path_factory.mktemp("alone")
    assert run_tiny(World(0, 1, 0, 1, torch.device("cpu")), tiny_config(folder, "train.sample_every=0", *SAME)) == 0
    return losses(folder / "runs" / "tiny")


@pytest.mark.timeout(900)  # several processes import torch, which takes a minute each where others use the cores
@pytest.mark.parametrize("by", ["torchrun", "accelerate", "deepspeed"])
def test_a_real_launcher_trains_the_same_tracks_one_run_and_stops_when_asked(
    tmp_path: Path, by: str, alone: dict[int, float]
) -> None:
    tiny_config(tmp_path)
    long = ("train.steps=100000", "train.eval_every=0", "train.sample_every=0", f"checkpoint.every={len(alone)}")
    run = tmp_path / "runs" / "tiny"
    with launched(tmp_path, "--with", by, "track.wandb=true", *long, *SAME) as process:
        while not list((run / "checkpoints").glob("step-*")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[0]
    assert process.returncode == 75, said
    assert "preflight: 2 ranks on 1 node" in said and "Traceback" not in said.partition("stopped after saving")[2]
    assert "distllm: stopped after saving; the same command continues" in said
    assert max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")) == max(losses(run))
    got = losses(run)
    assert all(abs(got[step] - alone[step]) < 2e-6 for step in alone) and len(alone) == 12
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert {path.name for path in (run / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert left_behind(tmp_path) == []


@pytest.mark.timeout(900)
def test_the_first_failure_is_told_under_torchrun(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    (tmp_path / "text.txt").unlink()
    with launched(tmp_path, "--with", "torchrun", "data.store=elsewhere") as process:
        said = process.communicate()[0]
    assert process.returncode == 3, said
    last = said.strip().splitlines()[-1]
    assert re.match(r"distllm: rank \d on \S+ failed first, with exit code 3: .*text.txt: ", last), said
    assert left_behind(tmp_path) == []
