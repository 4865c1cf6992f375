"""Two hosts with addresses and an sshd of their own: runs and a bench over a real network, a silent node, a cut cable."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.hosts import Hosts, hosts
from tests.runs import losses, tiny_config

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]
BENCH = ("--with", "torchrun", "--command", "bench", "--", "--grid", "ranks=2", "--warmup", "1")
TWO = ("device=cpu", "layout.dp_replicate=2", "layout.dp_shard=1", "train.sample_every=0")


@pytest.fixture(scope="module")
def lan() -> Iterator[Hosts]:
    folder = Path(tempfile.mkdtemp(prefix="distllm-hosts-"))
    try:
        with hosts(folder) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def launched(lan: Hosts, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`distllm launch --on ssh` from the third host."""
    environment = os.environ | {"PATH": f"{lan.folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    where = ("--on", "ssh", "--hosts", "node1,node2", "--gpus", "1")
    line = lan.on("launcher", sys.executable, "-m", "distllm", "launch", "tiny.yaml", *where, *TWO, *arguments, folder=folder)
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def ended(process: subprocess.Popen[str], limit_s: float = 120.0) -> tuple[str, str]:
    try:
        return process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def left_on(lan: Hosts, name: str) -> list[str]:
    """What of a job still runs on a host."""
    return [line for line in lan.processes(name).values() if "distllm" in line and "/sshd" not in line]


def nothing_left(lan: Hosts, limit_s: float = 20.0) -> bool:
    deadline = time.monotonic() + limit_s
    while any(left_on(lan, name) for name in ("launcher", "node1", "node2")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_a_run_over_two_hosts_ends_as_one_process_does(lan: Hosts, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    said, told = ended(process := launched(lan, tmp_path, "--with", "torchrun"))
    assert process.returncode == 0, said + told
    assert "preflight: 2 ranks on 2 nodes" in told + said
    alone = [sys.executable, "-m", "distllm", "train", "tiny.yaml", "name=alone", "train.sample_every=0"]
    subprocess.run(alone, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60, check=True)
    got, wanted = losses(tmp_path / "runs" / "tiny"), losses(tmp_path / "runs" / "alone")
    assert list(got) == list(wanted) and all(abs(got[s] - wanted[s]) < 2e-6 for s in wanted)
    logs = [(tmp_path / "runs" / "tiny" / "logs" / f"rank-{rank}.log").exists() for rank in range(2)]
    assert logs == [True, True] and nothing_left(lan, 1.0)


def test_a_host_that_does_not_answer_is_told_and_none_is_started(lan: Hosts, tmp_path: Path) -> None:
    tiny_config(tmp_path, prepared=False)
    lan.cable("node2", up=False)
    try:
        said, told = ended(process := launched(lan, tmp_path, "--with", "torchrun"))
    finally:
        lan.cable("node2", up=True)
    assert process.returncode == 7 and said == ""
    ssh, ours = told.splitlines()
    assert ssh.startswith("node2: ssh: connect to host node2 port 22: ")
    assert ours == "distllm: node2: ssh cannot reach it, see its own line above; nearest: ssh node2 true"
    assert nothing_left(lan, 1.0) and not (tmp_path / "runs" / "tiny").exists()


def test_a_cable_that_is_cut_ends_the_run_and_leaves_nothing(lan: Hosts, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    long = ("train.steps=1000000", "train.eval_every=0", "checkpoint.every=100", "train.log_every=100", "train.timeout_s=10")
    process = launched(lan, tmp_path, *long, "--with", "torchrun")
    saved = tmp_path / "runs" / "tiny" / "checkpoints"
    deadline = time.monotonic() + 90
    while not list(saved.glob("step-*")):
        assert time.monotonic() < deadline and process.poll() is None, ended(process)
        time.sleep(0.1)
    lan.cable("node2", up=False)
    try:
        _, told = ended(process)
        assert process.returncode == 7, told
        assert "distllm: rank 1 (host node2) stopped answering at step " in told
        assert told.splitlines()[-1] == (
            "distllm: node2: had not ended 15 s after it was told to, so its connection was cut; what runs there ends by itself; "
            "nearest: ssh node2 true"
        )
        assert left_on(lan, "launcher") == [] and left_on(lan, "node1") == []
    finally:
        lan.cable("node2", up=True)
    assert nothing_left(lan)


def test_a_bench_over_two_hosts_leaves_one_record_that_names_both(lan: Hosts, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    said, told = ended(process := launched(lan, tmp_path, *BENCH, "--steps", "2"), 200.0)
    assert process.returncode == 0, said + told
    out = tmp_path / "runs" / "tiny-bench"
    record = json.loads((out / "bench.json").read_text())
    (cell,) = record["cells"]
    assert cell["status"] == "measured" and cell["ranks"] == 2 and cell["layout"] == {"dp_replicate": 2}, said + told
    assert len(cell["figures"]["step_s"]) == 2 and cell["figures"]["sent"] > 0
    assert record["hardware"]["job_ranks"] == 2 and record["hardware"]["job_nodes"] == {"node1": 1, "node2": 1}
    assert record["command"].startswith("distllm bench tiny.yaml ") and record["command"].endswith(" --steps 2")
    assert {path.name for path in out.iterdir()} == {"bench.json", "bench.csv", "memory.png"}
    assert said.count("ranks=2 ") == 1 and "node2: ranks=2" not in said  # the first rank alone speaks
    reports = [json.loads((tmp_path / "runs/.launch/tiny-bench/ssh" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [(r["node"], r["code"]) for r in reports] == [("node1", 0), ("node2", 0)]
    assert nothing_left(lan, 1.0)


def test_a_bench_that_fails_tells_why_first_and_keeps_its_code(lan: Hosts, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    (tmp_path / "old.json").write_text("{}")
    said, told = ended(process := launched(lan, tmp_path, *BENCH, "--compare", "old.json"), 200.0)
    why = "--compare=old.json: is no record of distllm bench (KeyError)"
    assert process.returncode == 3 and said == "", told
    ours = [line for line in told.splitlines() if line.startswith("distllm: ")]
    assert len(ours) == 2 and ours[0] == f"distllm: {why}"
    assert re.fullmatch(rf"distllm: rank [01] on node[12] failed first, with exit code 3: {re.escape(why)}", ours[1])
    assert told.index(ours[0]) < told.index("Traceback") < told.index(ours[1])  # torchrun's own lines stand between
    assert nothing_left(lan, 1.0) and not (tmp_path / "runs" / "tiny-bench").exists()


def test_a_node_that_dies_in_a_bench_is_named_and_nothing_is_left(lan: Hosts, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    process = launched(lan, tmp_path, *BENCH, "--steps", "1000000")
    deadline = time.monotonic() + 200
    while sum(" -m distllm bench " in line and "torch.distributed.run" not in line for line in left_on(lan, "node2")) < 2:
        assert time.monotonic() < deadline and process.poll() is None, ended(process)  # the rank, and the process of its cell
        time.sleep(0.1)
    for pid, line in lan.processes("node2").items():
        if "distllm" in line and "/sshd" not in line:
            os.kill(pid, signal.SIGKILL)
    said, told = ended(process)
    assert process.returncode == 7 and said == "", told
    (ours,) = [line for line in told.splitlines() if line.startswith("distllm: ")]
    assert ours == (
        "distllm: node2 (rank 1): the connection broke, or distllm was killed there; what still runs there ends by itself; "
        "nearest: ssh node2 true"
    )
    assert nothing_left(lan) and not list((tmp_path / "runs" / "tiny-bench").iterdir())
