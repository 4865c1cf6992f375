"""The begin and the end of one attempt of a job under SLURM; the sbatch script calls both. No torch.

`python -m distllm.launch.attempt begin FOLDER ...` prints where the ranks meet; `end` tells the first failure and asks
SLURM for the next attempt.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from distllm.config.errors import EXIT_CONFIG, EXIT_LOST, EXIT_STOPPED, EXIT_STUCK
from distllm.launch.reports import clear_reports, first_failure, outcome, read_reports
from distllm.node_names import expand

LEDGER = "attempts.jsonl"
NO_STEP = 213
"""What the script lets srun end with where SLURM cannot start the ranks (SLURM_EXIT_ERROR); no rank ends with it."""
ANSWER_S = 20
"""Seconds in which a node must take a task."""
_FIRST_PORT, _PORTS = 20_000, 12_000  # below the range from which Linux takes ports for outgoing connections


def main(argv: list[str] | None = None) -> int:
    """Run `begin` or `end`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distllm.launch.attempt", description=__doc__)
    parser.add_argument("what", choices=("begin", "end"))
    parser.add_argument("folder", type=Path, help="the launch's folder")
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--once", action="store_true", help="what the job does is not continued: nothing is requeued")
    parser.add_argument("--nodes", type=int, default=0, help="as asked for; 0 takes what there are")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--asked", default="none")
    parser.add_argument("--script", default="")
    given = parser.parse_args(argv)
    try:
        if given.what == "begin":
            return _begin(given)
        return _end(given)
    except ValueError as error:
        _say(str(error))
        return EXIT_CONFIG


def newest_step(run: Path) -> int:
    """The step of the newest whole checkpoint of a run; -1 where there is none. Only names are read."""
    steps = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    return max((int(step) for step in steps if step.isdecimal()), default=-1)


def stuck(ledger: Path, *, now: int, attempts: int) -> bool:
    """Whether `attempts` attempts in a row, the last ones, began at the step that the run still has."""
    begun = _steps(ledger)
    return len(begun) >= attempts and all(step == now for step in begun[-attempts:])


def meeting_point(environment: Mapping[str, str]) -> tuple[str, int]:
    """The address of the job's first node, which is this one, and a free port of it.

    The port comes from the job's number, so that two jobs on one node seldom try the same, and is the first free one.
    """
    nodes = expand(environment.get("SLURM_JOB_NODELIST", "localhost"))
    address = "127.0.0.1" if len(nodes) == 1 else _address(nodes[0])
    start = int(environment.get("SLURM_JOB_ID", "0")) * 31 % _PORTS
    for offset in range(200):
        port = _FIRST_PORT + (start + offset) % _PORTS
        if port_is_free(port):
            return address, port
    raise ValueError(
        f"MASTER_PORT={_FIRST_PORT + start}: it and the 199 ports after it are in use; nearest: another node"
    )


def port_is_free(port: int) -> bool:
    """Whether nobody listens at a port of this machine, on any interface."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            probe.listen(1)
    except OSError:
        return False
    return True


def _begin(given: argparse.Namespace) -> int:
    folder, step = given.folder, newest_step(given.run)
    folder.mkdir(parents=True, exist_ok=True)
    if not given.once and stuck(folder / LEDGER, now=step, attempts=given.attempts):
        return _tell_stuck(given, step)
    clear_reports(folder)
    _write(folder / LEDGER, {"step": step, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))})
    nodes = expand(os.environ.get("SLURM_JOB_NODELIST", "localhost"))
    if given.nodes not in (0, len(nodes)):
        return _wrong_nodes(given, nodes)
    (folder / "hostfile").write_text("".join(f"{node} slots={given.slots}\n" for node in nodes), encoding="utf-8")
    address, port = meeting_point(os.environ)
    print(address, port)
    return 0


def _end(given: argparse.Namespace) -> int:
    size = int(os.environ.get("DISTLLM_RANKS", "1"))
    reports = read_reports(given.folder)
    if given.code == NO_STEP and first_failure(reports) is None and given.asked == "none" and not given.once:
        return _again(given, "SLURM did not start the ranks on all nodes, see srun's line above")
    code, lines = outcome(reports, code=given.code, size=size)
    for line in lines:
        _say(line)
    if code not in (0, EXIT_STOPPED) and given.asked == "none" and not given.once:
        silent = len({report.rank for report in reports}) < size
        first = first_failure(reports)
        if silent and (first is None or first.code == EXIT_LOST) and not _nodes_answer(os.environ):
            return _again(given, "not all nodes answer any more")  # SLURM itself may notice minutes later
    if code not in (0, EXIT_STOPPED) and not given.once:
        _say(f"logs of the ranks: {given.run}/logs/rank-N.log")
    if code != EXIT_STOPPED or given.asked != "none" or given.once:
        return code
    return _again(given, f"stopped at step {newest_step(given.run)} before the time limit")


def _nodes_answer(environment: Mapping[str, str]) -> bool:
    """Whether every node of the job still starts a task. Where they do, a rank that was killed is no matter of the nodes."""
    nodes = len(expand(environment.get("SLURM_JOB_NODELIST", "localhost")))
    if nodes == 1:
        return True  # this script runs there
    step = ["srun", "--overlap", f"--immediate={ANSWER_S}", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    try:
        done = subprocess.run([*step, "true"], capture_output=True, text=True, timeout=3 * ANSWER_S, check=False)
    except OSError:
        return True
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 or "option" in done.stderr  # an older srun that has no --overlap tells nothing


def _wrong_nodes(given: argparse.Namespace, nodes: list[str]) -> int:
    """Do not start on other nodes than the ranks were counted for; a job that lost one may come back without it."""
    count = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} ({', '.join(nodes[:8])})"
    why = f"SLURM gave {count} where {given.nodes} were asked for"
    if given.once:
        _say(f"{why}; nearest: submit it again")
        return EXIT_LOST
    return _again(given, why) or EXIT_STOPPED  # not 0, with which the script would go on


def _again(given: argparse.Namespace, why: str) -> int:
    """Go on in another attempt, if those before it came any further."""
    step = newest_step(given.run)
    if stuck(given.folder / LEDGER, now=step, attempts=given.attempts):
        _say(why)
        return _tell_stuck(given, step)
    return _requeue(given, why)


def _requeue(given: argparse.Namespace, again: str) -> int:
    """Ask for the next attempt: the same job again, else a new job from the same script, else by exit code 75."""
    job = os.environ.get("SLURM_JOB_ID", "")
    _say(f"{again}; asking SLURM to requeue job {job}")
    if _runs(["scontrol", "requeue", job]):
        return EXIT_STOPPED  # SLURM ends this script now
    array = ["--array=" + os.environ["SLURM_ARRAY_TASK_ID"]] if "SLURM_ARRAY_TASK_ID" in os.environ else []
    script = given.folder / "again.sbatch"
    try:
        script.write_bytes(Path(given.script).read_bytes())
    except OSError:
        return EXIT_STOPPED
    # DISTLLM_LAUNCH is among the variables that the script exports, so the new job counts its attempts in the same folder.
    if _runs(["sbatch", *array, str(script)]):
        _say(f"{again}; a new job continues it")
        return 0
    _say(
        f"{again}; neither scontrol nor sbatch works here: exit code {EXIT_STOPPED} (RequeueExit in slurm.conf requeues it)"
    )
    return EXIT_STOPPED


def _tell_stuck(given: argparse.Namespace, step: int) -> int:
    where = f"step {step}" if step >= 0 else "the beginning"
    _say(
        f"no progress: the last {given.attempts} attempts all began at {where} and saved nothing further, so the job stops; "
        f"give it more --time, or save more often with checkpoint.every; to try again: remove {given.folder / LEDGER}"
    )
    return EXIT_STUCK


def _address(node: str) -> str:
    """The address of a node: its name where it resolves, else what SLURM knows."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        done = subprocess.run(
            ["scontrol", "show", "node", node, "-o"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return node
    words = [word.removeprefix("NodeAddr=") for word in done.stdout.split() if word.startswith("NodeAddr=")]
    return words[0] if words else node


def _runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _steps(ledger: Path) -> list[int]:
    """Where the attempts so far began; a line that a node's death or a full disk cut off is left out."""
    found = []
    for line in ledger.read_text(encoding="utf-8", errors="replace").splitlines() if ledger.exists() else ():
        try:
            found.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _write(ledger: Path, entry: dict[str, int]) -> None:
    cut = ledger.exists() and ledger.read_bytes()[-1:] not in (b"", b"\n")
    with ledger.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(entry) + "\n")


def _say(line: str) -> None:
    print(f"distllm: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
