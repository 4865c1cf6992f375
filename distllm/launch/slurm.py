"""Giving a job to SLURM."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from distllm.config.errors import ConfigError
from distllm.config.places import make_folder
from distllm.launch.job import Job
from distllm.launch.sbatch import sbatch_script

SCRIPT = "job.sbatch"


def submit(job: Job) -> tuple[str, Path]:
    """Write the job's script and give it to sbatch.

    Returns:
        The job's number, and the script.

    Raises:
        ConfigError: there is no sbatch here, or SLURM refuses the job: nothing is queued then.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            ["--on=slurm: there is no sbatch on this machine; nearest: a login node of the cluster, or --on local"]
        )
    script = Path(job.launch_folder) / SCRIPT
    make_folder(script.parent, key="out", value=job.out, near="runs")
    script.write_text(sbatch_script(job), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DISTLLM_")}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            ["--on=slurm: sbatch does not answer within 60 s; nearest: sinfo, which shows whether it is up"]
        ) from None
    if done.returncode != 0:
        raise ConfigError([_refusal(job, done.stderr)])
    number = done.stdout.strip().partition(";")[0]
    _refuse_waiting_for_ever(job, number)
    if job.resumes:
        _remember(job, number)
    return number, script


def _remember(job: Job, number: str) -> None:
    """Write the job's number where `distllm jobs` looks for runs that still wait."""
    jobs = {f"{job.name}-{index}": f"{number}_{index}" for index in range(len(job.slurm.sweep))} or {job.name: number}
    for name, its_number in jobs.items():
        folder = Path(job.out) / ".launch" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps({"job": its_number}) + "\n", encoding="utf-8")


def _refuse_waiting_for_ever(job: Job, number: str) -> None:
    """Take a job back that no partition can ever run: most sites let sbatch queue it all the same."""
    reason = _output(["squeue", "-h", "-j", number, "-o", "%r"]).strip()
    nodes, time = f"--nodes={job.nodes}", f" --time={job.slurm.time}" if job.slurm.time else ""
    known = {"PartitionNodeLimit": nodes, "PartitionTimeLimit": time.strip(), "PartitionConfig": nodes + time}
    if reason not in known:
        return
    asked = known[reason]
    _output(["scancel", number])
    near = "less, or another --partition (see sinfo)"
    raise ConfigError([f"{asked}: is more than the partition ever gives; nearest: {near}"])


def _refusal(job: Job, text: str) -> str:
    """sbatch's own words, with what to change."""
    said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines() if line.strip()]
    why = "; ".join(dict.fromkeys(said)) or "no reason given"
    if re.search("invalid partition", text, re.IGNORECASE):
        names = _partitions()
        near = (difflib.get_close_matches(job.slurm.partition, names, n=1, cutoff=0.0) or ["what sinfo shows"])[0]
        return f"--partition={job.slurm.partition}: SLURM has no such partition; nearest: {near}"
    if re.search("node configuration|node count|more processors|tasks? .*exceed", text, re.IGNORECASE):
        asked = f"--nodes={job.nodes} --gpus={job.ranks}"
        return f"{asked}: SLURM has no such nodes ({why}); nearest: fewer, or another --partition (see sinfo)"
    if re.search("controller|configuration source|configuration file|no cluster|socket timed out", text, re.IGNORECASE):
        return f"--on=slurm: SLURM does not answer here ({why}); nearest: sinfo, which shows whether it is up, or --on local"
    return f"--on=slurm: sbatch refused the job: {why}; nearest: correct that option"


def _partitions() -> list[str]:
    return sorted(set(_output(["sinfo", "-h", "-o", "%R"]).split()))


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
