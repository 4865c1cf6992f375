"""Jobs through a real sbatch: two nodes, gloo between them; how they end, are stopped, killed, and go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distllm.launch.attempt import newest_step
from tests.launch.cluster import Cluster
from tests.runs import losses, tiny_config

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
TWO = ("device=cpu", "layout.dp_replicate=2", "layout.dp_shard=1", "track.wandb=true", "train.sample_every=0")
LONG = ("train.eval_every=0", "checkpoint.every=100", "train.eval_batches=1", "train.global_batch=4")
SECRET = "hf_0123456789abcdefghijklmnop"


def submit(slurm: Cluster, folder: Path, *arguments: str, code: int = 0) -> str:
    """`distllm launch --on slurm` in `folder`; returns the job's number, or what was told."""
    environment = os.environ | slurm.environment | {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_TOKEN": SECRET, "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "distllm", "launch", "tiny.yaml", "--on", "slurm", "--cpus", "1", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout if "--print" in arguments else done.stdout.split()[1]


def log(folder: Path, job: str, name: str = "tiny") -> str:
    path = folder / f"{name}-{job}.log"
    return path.read_text() if path.exists() else ""


def reached(folder: Path, step: int, *, limit_s: float = 90.0) -> None:
    """Wait until the run has saved a checkpoint at `step` or later."""
    deadline = time.monotonic() + limit_s
    saved = folder / "runs" / "tiny" / "checkpoints"
    while not any(int(p.name[5:]) >= step for p in saved.glob("step-*") if p.name[5:].isdecimal()):
        assert time.monotonic() < deadline, [path.read_text() for path in folder.glob("*.log")]
        time.sleep(0.1)


def one_run(folder: Path) -> int:
    """Check that all attempts wrote to one W&B run; returns how many attempts did."""
    offline = [path.name.rsplit("-", 1)[1] for path in (folder / "runs" / "tiny" / "wandb").glob("offline-run-*")]
    assert len(set(offline)) == 1, offline
    return len(offline)


def test_two_nodes_by_torchrun_train_as_one_process_does(slurm: Cluster, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    job = submit(slurm, tmp_path, *TWO, "--with", "torchrun", "--nodes", "2", "--gpus", "1", "--time", "5")
    slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT")
    said = log(tmp_path, job)
    assert slurm.state(job) == "COMPLETED", said
    assert "preflight: 2 ranks on 2 nodes" in said
    alone = [sys.executable, "-m", "distllm", "train", "tiny.yaml", "name=alone", "train.global_batch=8"]
    subprocess.run(alone, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60, check=True)
    got, wanted = losses(tmp_path / "runs" / "tiny"), losses(tmp_path / "runs" / "alone")
    assert list(got) == list(wanted) and all(abs(got[s] - wanted[s]) < 2e-6 for s in wanted)
    assert one_run(tmp_path) == 1
    run = tmp_path / "runs" / "tiny"
    assert {path.name for path in (run / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    summary = json.loads((run / "summary.json").read_text())
    assert {summary["node/0/name"], summary["node/1/name"]} == {"node1", "node2"}
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs/.launch/tiny" / job).glob("rank-*.json"))]
    assert [(r["rank"], r["node"], r["code"]) for r in reports] == [(0, "node1", 0), (1, "node2", 0)]
    for path in (tmp_path / "runs").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    shown = subprocess.run(
        [sys.executable, "-m", "distllm", "jobs", "runs"], cwd=tmp_path,
        env=os.environ | slurm.environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert re.search(rf"^tiny +done +12/12 +{got[12]:.4f} .*job {job}$", shown, re.MULTILINE), shown


def test_the_time_limit_saves_and_requeues_and_scancel_saves_and_does_not(slurm: Cluster, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    options = ("--with", "srun", "--nodes", "2", "--gpus", "1", "--time", "1", "--lead", "45")
    job = submit(slurm, tmp_path, *TWO, *LONG, "train.steps=1000000", "train.log_every=10", *options)
    slurm.requeued(job, restarts=1)  # SLURM's own signal came, up to a minute before the limit
    first = newest_step(tmp_path / "runs" / "tiny")
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=10")
    slurm.start(job)
    reached(tmp_path, first + 1)
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "PENDING")
    said = log(tmp_path, job)
    assert slurm.state(job) == "CANCELLED", said
    assert slurm.facts(job)["Restarts"] == "1"
    asked = re.findall(r"distllm: stopped at step (\d+) before the time limit; asking SLURM to requeue job (\d+)", said)
    assert asked == [(str(first), job)]
    assert f"continuing at step {first}" in said
    last = newest_step(tmp_path / "runs" / "tiny")
    assert list(losses(tmp_path / "runs" / "tiny")) == list(range(10, last + 1, 10))
    assert one_run(tmp_path) == 2
    ledger = (tmp_path / "runs/.launch/tiny" / job / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in ledger] == [{"step": -1, "restart": 0}, {"step": first, "restart": 1}]


@pytest.mark.timeout(480)
def test_preemption_and_the_death_of_a_node_cost_no_more_than_the_steps_since_a_checkpoint(
    slurm: Cluster, tmp_path: Path
) -> None:
    tiny_config(tmp_path)
    options = ("--with", "torchrun", "--nodes", "2", "--gpus", "1", "--time", "9")
    job = submit(slurm, tmp_path, *TWO, *LONG, "train.steps=1200", "train.log_every=10", *options)
    reached(tmp_path, 100)
    urgent = ("sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    other = slurm.run(*urgent, cwd=tmp_path).strip()
    slurm.wait(other, "COMPLETED")
    slurm.requeued(job, restarts=1)
    first = newest_step(tmp_path / "runs" / "tiny")
    slurm.start(job)
    assert 100 <= first < 1200 and slurm.facts(job)["Restarts"] == "1"
    reached(tmp_path, first + 100)
    slurm.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    slurm.requeued(job, restarts=2)  # the node comes back by itself (ReturnToService=2)
    # SLURM's own two minutes: a request to end the old attempt, meant for the node that was gone, may still be under way,
    # and a new attempt that is started at once can lose that node to it.
    slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT", limit_s=300.0)
    assert slurm.state(job) == "COMPLETED", log(tmp_path, job)
    assert slurm.facts(job)["Restarts"] == "2"
    assert f"continuing at step {first}" in log(tmp_path, job)
    assert list(losses(tmp_path / "runs" / "tiny")) == list(range(10, 1201, 10))
    assert one_run(tmp_path) == 3


def test_a_rank_that_is_killed_fails_the_job_and_is_named(slurm: Cluster, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    options = ("--with", "srun", "--nodes", "2", "--gpus", "1", "--time", "5")
    job = submit(slurm, tmp_path, *TWO, *LONG, "train.steps=100000", "train.log_every=1000", *options)
    reached(tmp_path, 100)
    victims = [
        process for process in psutil.process_iter(["cmdline", "environ"])
        if "tiny.yaml" in (process.info["cmdline"] or []) and (process.info["environ"] or {}).get("SLURM_PROCID") == "1"
        and process.info["environ"].get("SLURM_JOB_ID") == job
    ]  # fmt: skip
    assert len(victims) == 1
    victims[0].send_signal(signal.SIGKILL)
    slurm.wait(job, "FAILED", "COMPLETED", "TIMEOUT", "PENDING")
    assert slurm.state(job) == "FAILED"
    assert "distllm: rank 1 ended without a word: killed (often: out of memory)" in log(tmp_path, job), log(tmp_path, job)


def test_a_node_that_dies_without_a_word_is_noticed_before_slurm_does(slurm: Cluster, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    options = ("--with", "srun", "--nodes", "2", "--gpus", "1", "--time", "9")
    job = submit(slurm, tmp_path, *TWO, *LONG, "train.steps=400", "train.log_every=10", *options)
    reached(tmp_path, 100)
    slurm.kill_node("node2", whole=False)
    try:
        deadline = time.monotonic() + 100
        while f"distllm: not all nodes answer any more; asking SLURM to requeue job {job}" not in log(tmp_path, job):
            assert time.monotonic() < deadline, log(tmp_path, job)
            time.sleep(0.2)
    finally:
        slurm.revive_node("node2")
    slurm.requeued(job, restarts=1)
    slurm.start(job)
    slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert slurm.state(job) == "COMPLETED", log(tmp_path, job)
    assert "continuing at step " in log(tmp_path, job)
    assert list(losses(tmp_path / "runs" / "tiny")) == list(range(10, 401, 10))


def test_an_array_is_a_sweep(slurm: Cluster, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    options = ("--with", "srun", "--nodes", "1", "--gpus", "1", "--time", "5", "--sweep", "optim.lr=0.001,0.02", "--no-preflight")
    job = submit(slurm, tmp_path, "device=cpu", "layout.dp_shard=1", "train.steps=4", *options)
    deadline = time.monotonic() + 90
    runs = [tmp_path / "runs" / f"tiny-{index}" for index in range(2)]
    while not all((run / "summary.json").exists() for run in runs):
        assert time.monotonic() < deadline, [p.read_text() for p in tmp_path.glob("*.log")]
        time.sleep(0.2)
    rates = [re.search(r"^  lr: (\S+)$", (run / "config.yaml").read_text(), re.MULTILINE)[1] for run in runs]  # type: ignore[index]
    assert [float(rate) for rate in rates] == [0.001, 0.02]
    assert {path.name for path in tmp_path.glob("*.log")} == {f"tiny-{job}_0.log", f"tiny-{job}_1.log"}


def test_a_bench_runs_its_cells_in_the_job(slurm: Cluster, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    grid = ("--grid", "ranks=1,2,4 layout.dp_shard=auto", "--steps", "2", "--warmup", "1")
    options = ("--nodes", "2", "--gpus", "1", "--time", "5", "--command", "bench", "--")
    job = submit(slurm, tmp_path, "device=cpu", *options, *grid)
    slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT")
    said = log(tmp_path, job, "tiny-bench")
    assert slurm.state(job) == "COMPLETED", said
    record = json.loads((tmp_path / "runs" / "tiny-bench" / "bench.json").read_text())
    assert [cell["status"] for cell in record["cells"]] == ["measured", "measured", "refused"], said
    assert record["hardware"]["job_ranks"] == 2 and record["hardware"]["job_nodes"] == {"node1": 1, "node2": 1}
    assert record["cells"][1]["figures"]["sent"] > 0
    assert record["cells"][2]["why"] == "ranks=4: this job has 2 ranks; nearest: 2"
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs/.launch/tiny-bench" / job).glob("rank-*.json"))]
    assert [(r["rank"], r["node"], r["code"]) for r in reports] == [(0, "node1", 0), (1, "node2", 0)]
    assert slurm.facts(job)["Requeue"] == "0"


def scripted(slurm: Cluster, folder: Path, *options: str, change: tuple[tuple[str, str], ...], lead: tuple[str, ...] = ()) -> str:
    """Print the script of two nodes, change it, and give it to sbatch; returns the job's number."""
    tiny_config(folder)
    two = ("--with", "srun", "--nodes", "2", "--gpus", "1", "--time", "5", "--no-preflight", *options)
    text = submit(slurm, folder, *TWO[:3], *two, "--print")
    for old, new in change:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "job.sbatch").write_text(text)
    return slurm.run("sbatch", "--parsable", *lead, "job.sbatch", cwd=folder).strip()


def test_a_job_with_fewer_nodes_than_asked_is_requeued_and_stops_when_that_does_not_help(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    job = scripted(slurm, tmp_path, "--attempts", "2", change=(), lead=("--nodes=1",))  # stronger than the script's own line
    slurm.requeued(job, restarts=1)
    slurm.start(job)
    slurm.wait(job, "FAILED", "COMPLETED", "TIMEOUT", "CANCELLED")
    said = log(tmp_path, job)
    assert slurm.state(job) == "FAILED" and slurm.facts(job)["ExitCode"] == "10:0", said
    assert f"distllm: SLURM gave 1 node (node1) where 2 were asked for; asking SLURM to requeue job {job}" in said
    assert "distllm: no progress: the last 2 attempts all began at the beginning" in said
    assert not (tmp_path / "runs" / "tiny").exists()  # nothing was trained on half of the nodes


def test_ranks_that_slurm_does_not_start_are_not_waited_for_for_ever(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    step = "# shellcheck disable=SC2016"
    busy = 'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then srun -w node2 -N1 -n1 sleep 60 & sleep 1; fi\n' + step
    job = scripted(slurm, tmp_path, change=(("--immediate=300", "--immediate=2"), (step, busy)))
    slurm.requeued(job, restarts=1)
    said = log(tmp_path, job)
    assert f"srun: error: Unable to create step for job {job}: Requested nodes are busy" in said
    assert "distllm: SLURM did not start the ranks on all nodes, see srun's line above; asking SLURM to requeue" in said
    slurm.start(job)
    slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert slurm.state(job) == "COMPLETED", log(tmp_path, job)
    assert list(losses(tmp_path / "runs" / "tiny")) == list(range(1, 13))


def test_what_slurm_cannot_do_is_told_in_a_line_and_nothing_is_queued(slurm: Cluster, tmp_path: Path) -> None:
    tiny_config(tmp_path, prepared=False)
    four = ("device=cpu", "layout.dp_replicate=4", "layout.dp_shard=1", "--gpus", "1", "--nodes", "4")
    told = submit(slurm, tmp_path, *four, code=2)
    assert told == (
        "distllm: --nodes=4: is more than the partition ever gives; "
        "nearest: less, or another --partition (see sinfo)\n"
    )
    told = submit(slurm, tmp_path, *four, "--partition", "mian", code=2)
    assert told == "distllm: --partition=mian: SLURM has no such partition; nearest: main\n"
    assert slurm.run("squeue", "-h") == ""
