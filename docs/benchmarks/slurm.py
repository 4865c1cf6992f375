"""What SLURM does to a job, on a real local SLURM of two virtual nodes: each scenario against the same run unbroken.

    python docs/benchmarks/slurm.py

Two ranks train, one a node, over gloo. A job ends well, is pre-empted, loses a node, meets its time limit, or is one of an
array. The whole loss curve must be bitwise that of the unbroken run, and every sample must have been taken once, or the
script fails. Needs root, slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import distllm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from distllm.launch.attempt import newest_step  # noqa: E402
from tests.launch.cluster import Cluster, cluster, missing  # noqa: E402
from tests.runs import losses, tiny_config  # noqa: E402

BATCH = 8
TRAIN = (
    "device=cpu", f"train.global_batch={BATCH}", "train.eval_every=0", "train.sample_every=0", "train.log_every=10",
    "checkpoint.every=50", "track.wandb=true",
)  # fmt: skip
TWO = ("layout.dp_replicate=2", "layout.dp_shard=1")
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


class Site:
    """The cluster and a folder for each scenario."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self._environment = os.environ | slurm.environment | {
            "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def submit(self, name: str, *words: str, ranks: tuple[str, ...] = TWO, nodes: int = 2) -> tuple[Path, str]:
        """`distllm launch --on slurm` in a folder of the scenario; returns the folder and the job's number."""
        folder = self.folder / name
        tiny_config(folder)
        where = ("--on", "slurm", "--with", "srun", "--nodes", str(nodes), "--gpus", "1", "--cpus", "1")
        return folder, self._distllm(folder, "launch", "tiny.yaml", *where, *TRAIN, *ranks, *words).split()[1]

    def alone(self, name: str, *words: str) -> Path:
        """The same training of one rank without SLURM; returns its run folder."""
        folder = self.folder / name
        tiny_config(folder)
        self._distllm(folder, "train", "tiny.yaml", *TRAIN, *words)
        return folder / "runs" / "tiny"

    def end(self, folder: Path, job: str, *, limit_s: float = 400.0) -> None:
        """Wait until the job is done."""
        state = self.slurm.wait(job, *ENDS, limit_s=limit_s)
        assert state == "COMPLETED", (state, [path.read_text() for path in folder.glob("*.log")])

    def _distllm(self, folder: Path, *words: str) -> str:
        command = [sys.executable, "-m", "distllm", *words]
        done = subprocess.run(
            command, cwd=folder, env=self._environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def reached(run: Path, step: int, *, limit_s: float = 120.0) -> None:
    """Wait until a run has saved a checkpoint at `step` or later."""
    deadline = time.monotonic() + limit_s
    while newest_step(run) < step:
        assert time.monotonic() < deadline, f"no checkpoint at step {step}"
        time.sleep(0.1)


def told(run: Path, steps: int, *, unbroken: Path, began: float, stops: list[dict[str, int]]) -> dict[str, Any]:
    """The figures of a run that is done; fails where it differs from the unbroken one.

    Args:
        run: its folder.
        steps: how many it was to take.
        unbroken: the folder of the run that it must equal.
        began: when it was submitted, by the monotonic clock.
        stops: of each end of an attempt: the last step that was logged, and that of the checkpoint.
    """
    seconds = time.monotonic() - began
    got, wanted = losses(run), losses(unbroken)
    assert list(got) == list(wanted) == list(range(10, steps + 1, 10)), "a step is missing, or is there twice"
    assert got == wanted, "the losses differ"
    manifest = json.loads((run / "checkpoints" / f"step-{steps}" / "manifest.json").read_text())
    lost = steps * BATCH - manifest["facts"]["position"]["samples"]
    ids = {path.name.rsplit("-", 1)[1] for path in (run / "wandb").glob("offline-run-*")}
    assert lost == 0 and len(ids) == 1
    before = [stop["saved"] for stop in stops]
    again = [stop["logged"] + 9 - stop["saved"] if stop["logged"] > stop["saved"] else 0 for stop in stops]
    return {
        "steps": steps, "attempts": len(stops) + 1, "steps_before": before, "steps_after": steps - max(before, default=0),
        "steps_taken_again_at_most": again,
        "samples_lost": lost, "final_loss": got[steps], "unbroken_final_loss": wanted[steps], "bitwise_equal": got == wanted,
        "wandb_runs": len(ids), "seconds": round(seconds, 1),
    }  # fmt: skip


def stop_of(run: Path) -> dict[str, int]:
    """Where a run stands when an attempt has ended: steps are logged every 10."""
    return {"logged": max(losses(run), default=0), "saved": newest_step(run)}


def normal_end(site: Site, steps: int, unbroken: Path) -> dict[str, Any]:
    """A job that nothing happens to, through torchrun in place of srun."""
    began = time.monotonic()
    folder, job = site.submit("normal", f"train.steps={steps}", "--with", "torchrun", "--time", "9")
    site.end(folder, job)
    return told(folder / "runs" / "tiny", steps, unbroken=unbroken, began=began, stops=[])


def preempted(site: Site, steps: int, unbroken: Path) -> dict[str, Any]:
    """A more urgent job takes both nodes: the run saves, waits, and goes on."""
    began = time.monotonic()
    folder, job = site.submit("preempted", f"train.steps={steps}", "--time", "9")
    run = folder / "runs" / "tiny"
    reached(run, 100)
    urgent = ("sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    site.slurm.wait(site.slurm.run(*urgent, cwd=folder).strip(), "COMPLETED")
    return _went_on(site, folder, job, steps, unbroken, began)


def node_set_down(site: Site, steps: int, unbroken: Path) -> dict[str, Any]:
    """A node is set down: SLURM ends the ranks, which save, and requeues the job."""
    began = time.monotonic()
    folder, job = site.submit("node-down", f"train.steps={steps}", "--time", "9")
    reached(folder / "runs" / "tiny", 100)
    site.slurm.run("scontrol", "update", "nodename=node2", "state=down", "reason=benchmark")
    return _went_on(site, folder, job, steps, unbroken, began, early=False)


def killed_node(site: Site, steps: int, unbroken: Path) -> dict[str, Any]:
    """SIGKILL to a node's daemon and all on it: SLURM notices after SlurmdTimeout (120 s here); steps are taken again."""
    began = time.monotonic()
    folder, job = site.submit("killed-node", f"train.steps={steps}", "--time", "9")
    reached(folder / "runs" / "tiny", 100)
    time.sleep(1.0)  # somewhere between two checkpoints
    killed = time.monotonic()
    site.slurm.kill_node("node2", whole=True)
    try:
        while site.slurm.facts(job)["Restarts"] != "1":
            assert time.monotonic() < killed + 200, "the job is not requeued"
            time.sleep(0.2)
        noticed = time.monotonic() - killed
    finally:
        site.slurm.revive_node("node2")
    found = _went_on(site, folder, job, steps, unbroken, began)
    return found | {"seconds_until_requeued": round(noticed, 1)}


def time_limit(site: Site, steps: int, unbroken: Path) -> dict[str, Any]:
    """A limit of a minute: SLURM's own signal, up to a minute before it, saves the run and requeues the job."""
    began = time.monotonic()
    folder, job = site.submit("time-limit", f"train.steps={steps}", "--time", "1", "--lead", "25")
    site.slurm.requeued(job, restarts=1)
    site.slurm.run("scontrol", "update", f"jobid={job}", "timelimit=10")
    return _went_on(site, folder, job, steps, unbroken, began)


def _went_on(
    site: Site, folder: Path, job: str, steps: int, unbroken: Path, began: float, *, early: bool = True
) -> dict[str, Any]:
    """Let a job that is being requeued go on, at once or when SLURM does (two minutes later)."""
    run = folder / "runs" / "tiny"
    site.slurm.requeued(job, restarts=1)
    stops = [stop_of(run)]
    if early:
        site.slurm.start(job)
    site.end(folder, job)
    found = told(run, steps, unbroken=unbroken, began=began, stops=stops)
    return found | {"started_again": "by hand" if early else "by SLURM, after its two minutes"}


def array(site: Site, steps: int, unbroken: Path) -> dict[str, Any]:
    """A sweep over two learning rates, one rank each, against the same trainings without SLURM."""
    rates = ("0.001", "0.02")
    alone = [site.alone(f"alone-{rate}", "layout.dp_shard=1", f"train.steps={steps}", f"optim.lr={rate}") for rate in rates]
    began = time.monotonic()
    sweep = ("--time", "9", "--sweep", f"optim.lr={','.join(rates)}", "--no-preflight")
    folder, job = site.submit("array", f"train.steps={steps}", *sweep, ranks=("layout.dp_shard=1",), nodes=1)
    deadline = time.monotonic() + 300
    while any(state not in ENDS for state in site.slurm.state(job).split()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    runs = [folder / "runs" / f"tiny-{index}" for index in range(len(rates))]
    elements = [told(run, steps, unbroken=one, began=began, stops=[]) for run, one in zip(runs, alone, strict=True)]
    return {"elements": elements}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--limit-steps", type=int, default=4000, help="steps of the run that meets its time limit")
    parser.add_argument("--only", default="", help="one scenario, whose figures take their place in the record that is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    why = missing()
    if why:
        sys.exit(why)
    scenarios: dict[str, tuple[Callable[[Site, int, Path], dict[str, Any]], int]] = {
        "normal end": (normal_end, args.steps), "pre-emption and requeue": (preempted, args.steps),
        "node set down": (node_set_down, args.steps), "killed node": (killed_node, args.steps),
        "time limit": (time_limit, args.limit_steps), "array": (array, args.steps),
    }  # fmt: skip
    place, work = Path(tempfile.mkdtemp(prefix="distllm-slurm-")), Path(tempfile.mkdtemp(prefix="distllm-bench-"))
    found: dict[str, Any] = {}
    try:
        with cluster(place) as slurm:
            version = slurm.run("sinfo", "--version").strip()
            site = Site(slurm, work)
            lengths = {steps for name, (_, steps) in scenarios.items() if args.only in ("", name)}
            whole = {steps: site.alone(f"unbroken-{steps}", *TWO, f"train.steps={steps}") for steps in lengths}
            for name, (scenario, steps) in scenarios.items():
                if args.only not in ("", name):
                    continue
                slurm.clear()
                found[name] = scenario(site, steps, whole[steps])
                print(f"{name}: {json.dumps(found[name])}", flush=True)
    finally:
        for folder in (place, work):
            shutil.rmtree(folder, ignore_errors=True)
    if args.only:
        found = json.loads(args.out.read_text(encoding="utf-8"))["scenarios"] | found
    record = {
        "what": "jobs of two nodes with a gloo rank each on a local SLURM, against the same run unbroken without SLURM",
        "command": " ".join(["python", "docs/benchmarks/slurm.py", *sys.argv[1:]]), "date": date.today().isoformat(),
        "versions": {
            "distllm": distllm.__version__, "torch": torch.__version__, "python": platform.python_version(), "slurm": version,
        },
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "backend": "gloo"},
        "batch": BATCH, "checkpoint_every": 50, "scenarios": found,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
