"""Running a job on several nodes by ssh: all of them answer before any starts, and all end together."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from distllm.config.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_OK, EXIT_STOPPED, DistllmError
from distllm.config.places import make_folder
from distllm.launch.commands import Place, command, hostfile
from distllm.launch.family import Request
from distllm.launch.job import Job
from distllm.launch.node import versions
from distllm.launch.reports import clear_reports, outcome, read_reports
from distllm.launch.settings import settings
from distllm.launch.words import told

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")
"""A question (a password, an unknown host) is an error at once; a dead connection is noticed within a minute."""
BROKEN = 255
"""What ssh ends with when its connection breaks, or when a signal ends what it started."""
ANSWER_S = 20.0
END_S = 15.0
"""A node gives what it started 10 s between SIGTERM and SIGKILL (family.py), and then ends."""
_PORTS = range(20_000, 32_000)


class LaunchError(DistllmError):
    """A node that cannot take part."""

    exit_code = EXIT_LOST


@dataclass
class _Node:
    """One node's connection."""

    host: str
    number: int
    process: subprocess.Popen[str]
    said: queue.Queue[str | None]
    relays: list[threading.Thread]

    def send(self, value: object) -> None:
        """One JSON line; a node that is gone is noticed by its end."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()

    def hang_up(self) -> None:
        """End the input, upon which the node ends everything that it started."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()


def run_ssh(job: Job, *, ssh: Sequence[str] = SSH) -> int:
    """Run the job on its hosts and wait for it.

    Args:
        job: checked.
        ssh: the command that reaches a host.

    Returns:
        The exit code of the rank that failed first, 7 where a node was lost, 75 after a stop on request, else 0.

    Raises:
        LaunchError: a node does not answer, has other versions, does not see the shared folder, or the port is in use;
            nothing has been started then.
    """
    shared = Path(job.launch_folder) / "ssh"
    make_folder(shared, key="out", value=job.out, near="runs")
    clear_reports(shared)
    request = Request(saves=job.resumes)
    with request.caught():
        nodes = [_connect(job, host, number, ssh) for number, host in enumerate(job.hosts)]
        patience_s = 1.0  # until something has been started
        try:
            job = _try(job, nodes, shared)
            patience_s = END_S
            for node in nodes:
                node.send(_order(job, node.number))
            code = _wait(nodes, request)
        finally:
            for node in nodes:
                node.hang_up()
            deadline = time.monotonic() + patience_s
            cut = [node.host for node in nodes if not _end(node, deadline)]
    if request.stop.is_set() and not job.resumes:
        return EXIT_INTERRUPTED
    reports = read_reports(shared)
    lost = [_gone(job, node) for node in nodes if node.process.returncode == BROKEN]
    code, lines = outcome(reports, code=EXIT_LOST if lost else code, size=job.size)
    if lost:  # ranks without a word are those of the lost nodes, and those that were ended because of them
        lines = lost if code == EXIT_LOST else [*lines, *lost]
    lines += [
        f"{host}: had not ended {END_S:.0f} s after it was told to, so its connection was cut; what runs there ends by itself; "
        f"nearest: ssh {host} true"
        for host in cut
    ]
    for line in lines:
        print(f"distllm: {line}", file=sys.stderr, flush=True)
    return code


def address_of(job: Job) -> str:
    """Where the ranks meet: as asked, else the first host's name."""
    return job.address or job.hosts[0].rpartition("@")[2]


def _connect(job: Job, host: str, number: int, ssh: Sequence[str]) -> _Node:
    """Start the hand on a node. Only what it needs to start is in the command: its folder and where Python looks."""
    path = os.environ.get("PYTHONPATH")
    start = ["env", f"PYTHONPATH={path}"] if path else []
    line = f"cd -- {shlex.quote(job.folder)} && exec {shlex.join([*start, job.python, '-m', 'distllm.launch.node'])}"
    process = subprocess.Popen(
        [*ssh, host, line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", process_group=0,
    )  # fmt: skip
    node = _Node(host, number, process, queue.Queue(), [])
    for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        node.relays.append(threading.Thread(target=_relay, args=(node, source, target), daemon=True))
        node.relays[-1].start()
    return node


def _relay(node: _Node, source: IO[str] | None, target: IO[str]) -> None:
    """Pass a node's output on; of the others than the first with the node's name before each line."""
    assert source is not None
    first = target is sys.stdout
    prefix = f"{node.host}: " if node.number else ""
    with source:
        for line in source:
            if first:
                node.said.put(line)
                first = False
                continue
            with contextlib.suppress(OSError, ValueError):
                target.write(prefix + line)
                target.flush()
    if target is sys.stdout:
        node.said.put(None)


def _try(job: Job, nodes: Sequence[_Node], shared: Path) -> Job:
    """The preflight before anything starts: every node answers, and with the same versions, folder and a free port."""
    token = secrets.token_hex(8)
    (shared / "token").write_text(token, encoding="utf-8")
    port = job.port or _PORTS[secrets.randbelow(len(_PORTS))]
    for node in nodes:
        node.send({"shared": str(shared), "token": token, "node": node.number, "port": port if node.number == 0 else 0})
    deadline = time.monotonic() + ANSWER_S
    answers = [_answer(node, deadline) for node in nodes]
    own = versions()
    for node, answer in zip(nodes, answers, strict=True):
        for name in sorted(own.keys() | answer["versions"].keys()):
            here, there = own.get(name, "none"), answer["versions"].get(name, "none")
            if here != there:
                raise LaunchError(
                    f"{node.host}: has {name} {there}, and here it is {here}; nearest: the same environment on every node"
                )
        if not answer["seen"]:
            raise LaunchError(
                f"{node.host}: does not see the file that was just written to {shared.resolve()}, or cannot write there; "
                "nearest: out=... in a folder that every node shares"
            )
    if not answers[0]["port"]:
        raise LaunchError(f"--port={port}: is in use on {nodes[0].host}; nearest: another one, or none at all")
    return replace(job, port=port)


def _answer(node: _Node, deadline: float) -> dict[str, Any]:
    try:
        line = node.said.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise LaunchError(
            f"{node.host}: does not answer within {ANSWER_S:.0f} s; nearest: ssh {node.host} true"
        ) from None
    if line is None:
        code = node.process.wait()
        why = "ssh cannot reach it" if code == BROKEN else f"distllm does not start there (exit code {code})"
        raise LaunchError(f"{node.host}: {why}, see its own line above; nearest: ssh {node.host} true")
    try:
        answer = json.loads(line)
        return {"versions": dict(answer["versions"]), "seen": bool(answer["seen"]), "port": bool(answer["port"])}
    except (ValueError, KeyError, TypeError):
        what = told(line.strip())[:80]
        raise LaunchError(f"{node.host}: answers {what!r}; nearest: a login shell that prints nothing") from None


def _order(job: Job, number: int) -> dict[str, Any]:
    """What a node is told to run. The values of forwarded variables are here, and nowhere on a command line."""
    folder = f"{job.launch_folder}/ssh"
    address, port = address_of(job), str(job.port)
    place = Place(str(number), address, port, folder, folder)
    values = {name: os.environ[name] for name in job.forward if name in os.environ}
    found = settings(job, folder=folder, meet=folder, master=(address, port) if job.nodes > 1 else None)
    return {
        "argv": command(job, place), "environment": values | {s.name: s.value for s in found},
        "files": {f"{folder}/hostfile": hostfile(job)} if job.by == "deepspeed" else {},
    }  # fmt: skip


def _wait(nodes: Sequence[_Node], request: Request) -> int:
    """Wait for all nodes; the first that fails ends the others, and its code is the answer."""
    told_stop = False
    while any(node.process.poll() is None for node in nodes):
        failed = [code for node in nodes if (code := node.process.poll()) not in (None, EXIT_OK, EXIT_STOPPED)]
        if failed or request.kill.is_set():
            break
        if request.stop.is_set() and not told_stop:
            for node in nodes:
                node.send("stop")
            told_stop = True
        time.sleep(0.1)
    codes = [node.process.poll() for node in nodes]
    if request.kill.is_set():
        return EXIT_INTERRUPTED
    return next((code for code in codes if code not in (None, EXIT_OK, EXIT_STOPPED)), None) or max(
        c or 0 for c in codes
    )


def _gone(job: Job, node: _Node) -> str:
    """What is said of a node whose connection ended before its processes said how they ended."""
    first, last = node.number * job.ranks, (node.number + 1) * job.ranks - 1
    ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
    why = "the connection broke, or distllm was killed there; what still runs there ends by itself"
    return f"{node.host} ({ranks}): {why}; nearest: ssh {node.host} true"


def _end(node: _Node, deadline: float) -> bool:
    """Give a node the time that its processes have, then cut the connection; what it still said is passed on.

    Args:
        node: one that was hung up on.
        deadline: of the monotonic clock, the same for all nodes, as all were hung up on at once.

    Returns:
        Whether the node ended by itself.
    """
    try:
        node.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        alone = True
    except subprocess.TimeoutExpired:
        os.killpg(node.process.pid, signal.SIGKILL)
        node.process.wait()
        alone = False
    for relay in node.relays:
        relay.join(5.0)
    return alone
