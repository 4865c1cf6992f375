"""What is rendered: golden files, the scripts in launch/, and that a shell reads them as they are meant."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distllm.launch.commands import Place, command, hostfile
from distllm.launch.job import Job, Slurm, problems
from distllm.launch.sbatch import sbatch_script
from distllm.launch.script import local_script, ssh_script
from distllm.launch.settings import ALLOWED, forwarded, settings
from distllm.launch.ssh import SSH

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
WORDS = ("train", "configs/quickstart.yaml")
FORWARD = ("HF_HOME", "HF_TOKEN", "PATH", "PYTHONPATH", "WANDB_API_KEY", "WANDB_MODE")
TWO = ("layout.dp_shard=2", "device=cpu")
QUICK = Job("quickstart", "runs", (*WORDS, *TWO), "local", "torchrun", ranks=2)
LOCAL = {by: replace(QUICK, by=by) for by in ("torchrun", "deepspeed", "accelerate")}
SLURM = replace(
    QUICK, on="slurm", nodes=2, words=(*WORDS, "layout.dp_shard=4", "device=cpu"), forward=FORWARD,
    slurm=Slurm(time="1:00:00", cpus=2),
)  # fmt: skip
GPUS = replace(SLURM, words=WORDS, ranks=8, device="cuda", slurm=Slurm(partition="gpu", account="lab", time="1-0", cpus=12))
SSH_JOB = replace(
    QUICK, on="ssh", nodes=2, ranks=8, words=WORDS, device="cuda", hosts=("node1", "me@node2"), forward=FORWARD, folder="/home/me/my runs",
    threads=12, interface="eth0",
)  # fmt: skip
BENCH_WORDS = ("bench", "configs/quickstart.yaml", "device=cpu", "--grid", "ranks=1,2,4 layout.dp_shard=auto")
BENCH = replace(SLURM, name="quickstart-bench", words=BENCH_WORDS, preflight=False)
SWEEP = (("optim.lr=0.001", "seed=1"), ("optim.lr=0.003", "seed=1"))
TEXTS = {
    **{f"local-{by}.sh": local_script(job) for by, job in LOCAL.items()},
    "local-torchrun-gpu.sh": local_script(replace(QUICK, device="cuda", ranks=8)),
    **{f"slurm-{by}.sbatch": sbatch_script(replace(GPUS, by=by)) for by in ("torchrun", "deepspeed", "accelerate", "srun")},
    "slurm-cpu.sbatch": sbatch_script(SLURM),
    "slurm-bench.sbatch": sbatch_script(replace(GPUS, name="quickstart-bench", words=BENCH_WORDS, by="srun", preflight=False)),
    "local-bench.sh": local_script(replace(QUICK, name="quickstart-bench", words=BENCH_WORDS, preflight=False)),
    "slurm-one-node.sbatch": sbatch_script(replace(SLURM, nodes=1)),
    "slurm-sweep.sbatch": sbatch_script(replace(SLURM, by="srun", slurm=Slurm(sweep=SWEEP, at_once=1))),
    **{f"ssh-{by}.sh": ssh_script(replace(SSH_JOB, by=by), ssh=SSH, address="node1", port="29500") for by in LOCAL},
    "hostfile": hostfile(SSH_JOB),
}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_the_text_is_the_golden_one(name: str) -> None:
    """To change a text: write it with `python -m tests.launch.test_render`, and read the difference."""
    assert TEXTS[name] == (GOLDEN / name).read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(TEXTS)


def printed(*arguments: str, **environment: str) -> str:
    """What `distllm launch ... --print` writes in a repository, with a bare environment."""
    bare = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [sys.executable, "-m", "distllm", "launch", "--print", "--python", "python", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=bare | environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("by", ["torchrun", "deepspeed", "accelerate"])
def test_the_scripts_in_the_launch_folder_are_what_print_shows(by: str) -> None:
    text = printed("configs/quickstart.yaml", *TWO, "--with", by)
    threads = r"OMP_NUM_THREADS=\d+"  # follows from this machine's cores
    assert re.sub(threads, "OMP_NUM_THREADS=1", text) == (ROOT / "launch" / f"{by}.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("what", ["slurm", "bench"])
def test_the_sbatch_files_in_the_launch_folder_are_what_print_shows(what: str) -> None:
    values = dict.fromkeys(FORWARD, "x") | {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    options = ("--on", "slurm", "--nodes", "2", "--gpus", "2", "--time", "1:00:00", "--cpus", "2")
    train = ("configs/quickstart.yaml", "layout.dp_shard=4", "device=cpu", *options)
    bench = (BENCH_WORDS[1], BENCH_WORDS[2], *options, "--command", "bench", "--", *BENCH_WORDS[3:])
    text = printed(*(train if what == "slurm" else bench), **values)
    ours = ",".join((*FORWARD, "DISTLLM_LAUNCH"))
    text = re.sub("(?<=#SBATCH --export=).*", ours, text)  # which of the allowed variables are set, differs between users
    assert text == (ROOT / "launch" / f"{what}.sbatch").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted([*(ROOT / "launch").glob("*"), *GOLDEN.glob("*.s*")]), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--shell=bash", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


STUB = """#!/usr/bin/env python3
import json, os, sys
names = [n for n in os.environ if n.startswith(("DISTLLM_", "GLOO_", "ACCELERATE_", "DS_", "PET_", "TORCH_"))]
hostfile = next((w.partition("=")[2] for w in sys.argv if w.startswith("--hostfile=")), None)
seen = {"argv": sys.argv[1:], "environment": {n: os.environ[n] for n in names}, "hostfile": hostfile and open(hostfile).read()}
print(json.dumps(seen))
"""


@pytest.mark.parametrize("by", ["torchrun", "deepspeed", "accelerate"])
def test_the_script_runs_the_very_command_that_launch_runs(by: str, tmp_path: Path) -> None:
    stub = tmp_path / "my python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    job = replace(LOCAL[by], python=str(stub), words=("train", "a b.yaml", "name=it's", "x=$(touch made)"))
    (tmp_path / "job.sh").write_text(local_script(job))
    keep = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=keep, capture_output=True, text=True, timeout=30, check=True)
    seen = json.loads(done.stdout)
    meet = seen["environment"]["DISTLLM_MEET"]
    assert not Path(meet).exists()  # cleared away
    place = Place("0", "127.0.0.1", "29500", meet, meet)
    assert [str(stub), *seen["argv"]] == command(job, place)
    wanted = {s.name: s.value for s in settings(job, folder=meet, meet=meet, master=None)}
    assert {**seen["environment"], "OMP_NUM_THREADS": "1"} == wanted | {"DISTLLM_MEET": meet}
    assert seen["hostfile"] == ("localhost slots=2\n" if by == "deepspeed" else None)


def test_every_setting_says_why() -> None:
    for job in (*LOCAL.values(), SLURM, GPUS, SSH_JOB):
        for setting in settings(job, folder="f", meet="m", master=("a", "1")):
            assert re.fullmatch("[A-Z0-9_]+", setting.name) and len(setting.why) > 20 and "#" not in setting.why


def test_variables_travel_by_name_alone() -> None:
    names = {"WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "PATH", "WANDB_RUN_ID", "NCCL_DEBUG", "BASH_FUNC_x%%"}
    assert forwarded(names) == ("HF_TOKEN", "NCCL_DEBUG", "PATH", "WANDB_API_KEY")
    assert "AWS_REGION" in forwarded(names, ["AWS_REGION"]) and "HOME" in ALLOWED
    told = problems(replace(SLURM, forward=("WANDB_API_KEY=abc",)))
    assert told == [
        "--forward=WANDB_API_KEY=abc: must be the name of a variable alone: its value is taken from your environment and never "
        "written down; nearest: WANDB_API_KEY"
    ]


def test_no_value_of_a_variable_is_printed(tmp_path: Path) -> None:
    secret = "0123456789abcdef0123456789abcdef01234567"
    for options in (("--on", "slurm"), ("--on", "ssh", "--hosts", "n1,n2")):
        text = printed("configs/quickstart.yaml", "--nodes", "2", "--gpus", "1", *options, WANDB_API_KEY=secret, PYTHONPATH=str(ROOT))
        assert "WANDB_API_KEY" in text and secret not in text


if __name__ == "__main__":
    for name, text in TEXTS.items():
        (GOLDEN / name).write_text(text, encoding="utf-8")
    for by, job in LOCAL.items():
        (ROOT / "launch" / f"{by}.sh").write_text(local_script(job), encoding="utf-8")
    for what, job in (("slurm", SLURM), ("bench", BENCH)):
        (ROOT / "launch" / f"{what}.sbatch").write_text(sbatch_script(job), encoding="utf-8")
