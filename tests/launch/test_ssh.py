"""Several nodes by ssh: all answer before any starts, all end together. ssh is a stand-in that runs the line here."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distllm.launch import ssh as by_ssh
from distllm.launch.job import Job
from distllm.launch.ssh import LaunchError, run_ssh

# The stand-in: a host whose name is a file in HOSTS runs that file's line in place of what was asked.
SSH = """#!/bin/sh
host=$1; shift
echo "$host $*" >> "$HOSTS/called"
if [ -f "$HOSTS/$host" ]; then . "$HOSTS/$host"; fi
exec sh -c "$*"
"""
# In place of torchrun: what it was given, then as its node's file says.
LAUNCHER = """
import json, os, signal, sys, time
from pathlib import Path
node = next(word.partition("=")[2] for word in sys.argv if word.startswith("--node-rank="))
there = Path(os.environ["STUB_FOLDER"])
def stop(number, frame):
    sys.exit(75)
(there / f"node-{node}").write_text(json.dumps({"argv": sys.argv[1:], "key": os.environ.get("WANDB_API_KEY"), "pid": os.getpid(),
    "other": os.environ.get("NOT_FORWARDED"), "addr": os.environ["MASTER_ADDR"], "port": os.environ["MASTER_PORT"]}))
exec((there / "body.py").read_text())
"""
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = Path(__file__).parents[2]
    (tmp_path / "torch" / "distributed").mkdir(parents=True)
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncase "$2" in torch.distributed.run) shift 2; exec {sys.executable} {tmp_path}/launcher.py "$@";; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "body.py").write_text("sys.exit(0)")
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("HOSTS", str(tmp_path))
    monkeypatch.setenv("STUB_FOLDER", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(place: Path, *hosts: str, port: int = 0) -> Job:
    return Job(
        "run", "runs", ("train", "it's.yaml"), "ssh", "torchrun", nodes=len(hosts), ranks=2, hosts=hosts, folder=str(place),
        python=str(place / "python"), forward=("WANDB_API_KEY", "STUB_FOLDER"), port=port,
    )  # fmt: skip


def run(place: Path, *hosts: str, port: int = 0) -> int:
    return run_ssh(job(place, *hosts, port=port), ssh=[str(place / "ssh")])


def seen(place: Path, node: int) -> dict[str, object]:
    return json.loads((place / f"node-{node}").read_text())


def until(happened: object, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_every_node_gets_its_command_and_the_variables_by_no_command_line(place: Path) -> None:
    assert run(place, "n1", "me@n2") == 0
    for node in range(2):
        facts = seen(place, node)
        assert facts["key"] == KEY and facts["addr"] == "n1" and 20_000 <= int(str(facts["port"])) < 32_000
        assert f"--node-rank={node}" in facts["argv"] and facts["argv"][-2:] == ["train", "it's.yaml"]  # type: ignore[index, operator]
    called = (place / "called").read_text()
    assert KEY not in called and called.count("distllm.launch.node") == 2


@pytest.mark.parametrize(
    ("says", "line"),
    [
        ("echo 'ssh: connect to host n2 port 22: No route to host' >&2; exit 255", "n2: ssh cannot reach it, see its own line above; nearest: ssh n2 true"),
        ("exit 127", "n2: distllm does not start there (exit code 127), see its own line above; nearest: ssh n2 true"),
        ("echo 'Welcome to n2!'", "n2: answers 'Welcome to n2!'; nearest: a login shell that prints nothing"),
        ("exec sleep 30", "n2: does not answer within 1 s; nearest: ssh n2 true"),
        ("""echo '{"versions": {"torch": "1.0"}, "seen": true, "port": true}'; exec cat >/dev/null""", "n2: has accelerate none, and here it is "),
        ("cd /tmp && mkdir -p elsewhere.$$ && cd elsewhere.$$ && set -- \"$(echo \"$*\" | sed 's/^cd -- [^ ]* && //')\"", "n2: does not see the file that was just written to "),
    ],
)  # fmt: skip
def test_a_node_that_cannot_take_part_is_told_and_none_is_started(
    place: Path, says: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_ssh, "ANSWER_S", 1.0 if "sleep" in says else 20.0)
    (place / "n2").write_text(says + "\n")
    before = set(psutil.Process().children(recursive=True))  # libraries keep pools of workers
    with pytest.raises(LaunchError) as caught:
        run(place, "n1", "n2")
    assert str(caught.value).startswith(line)
    assert not (place / "node-0").exists() and not (place / "node-1").exists()
    left = {p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}
    assert left <= before


def test_a_port_in_use_is_told(place: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=f"--port={port}: is in use on n1; nearest: another one"):
            run(place, "n1", "n2", port=port)
    assert not (place / "node-0").exists()


def test_when_one_node_fails_the_other_is_ended(place: Path) -> None:
    (place / "body.py").write_text("sys.exit(3) if node == '1' else signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    assert run(place, "n1", "n2") == 3
    pid = int(str(seen(place, 0)["pid"]))
    until(lambda: not psutil.pid_exists(pid))


def test_nodes_that_are_slow_to_end_are_told_as_that_and_waited_for_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "body.py").write_text("sys.exit(3) if node == '0' else time.sleep(60)")
    for host in ("n2", "n3"):
        (place / host).write_text('sh -c "$*"; exec sleep 60\n')
    monkeypatch.setattr(by_ssh, "END_S", 2.0)
    waited: list[float] = []
    end = by_ssh._end
    monkeypatch.setattr(by_ssh, "_end", lambda node, deadline: (waited.append(deadline), end(node, deadline))[1])
    before = set(psutil.Process().children(recursive=True))
    assert run(place, "n1", "n2", "n3") == 3
    told = [line for line in capfd.readouterr().err.splitlines() if "had not ended" in line]
    assert told == [
        f"distllm: {host}: had not ended 2 s after it was told to, so its connection was cut; what runs there ends by itself; "
        f"nearest: ssh {host} true"
        for host in ("n2", "n3")
    ]
    assert len(waited) == 3 and len(set(waited)) == 1
    until(lambda: {p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE} <= before)


LOST = "the connection broke, or distllm was killed there; what still runs there ends by itself; nearest: ssh n2 true"


def test_a_node_that_is_lost_is_told_by_its_name_and_ranks(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "body.py").write_text("time.sleep(60) if node == '0' else os.kill(os.getppid(), signal.SIGKILL)")
    (place / "n2").write_text('sh -c "$*"; exit 255\n')  # as ssh does when a signal ends what it started
    assert run(place, "n1", "n2") == 7
    assert capsys.readouterr().err.splitlines()[-1] == f"distllm: n2 (ranks 2 to 3): {LOST}"


def test_what_a_rank_said_before_its_node_was_lost_stands_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = {"rank": 2, "node": "n2", "code": 8, "lines": ["out of memory"], "at": 1.0}
    write = f"Path(os.environ['DISTLLM_LAUNCH'], 'rank-2.json').write_text({json.dumps(report)!r})"
    (place / "body.py").write_text(f"time.sleep(60) if node == '0' else ({write}, os.kill(os.getppid(), signal.SIGKILL))")
    (place / "n2").write_text('sh -c "$*"; exit 255\n')
    assert run(place, "n1", "n2") == 8
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first == "distllm: rank 2 on n2 failed first, with exit code 8: out of memory"
    assert second == f"distllm: n2 (ranks 2 to 3): {LOST}"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_reaches_every_node_and_the_launchers_death_too(place: Path, sent: signal.Signals) -> None:
    (place / "body.py").write_text("signal.signal(signal.SIGUSR1, stop)\nwhile True: time.sleep(0.02)")
    code = (
        "import sys; from tests.launch.test_ssh import run; from pathlib import Path\n"
        f"sys.exit(run(Path({str(place)!r}), 'n1', 'n2'))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=place, env=dict(os.environ))
    until(lambda: (place / "node-0").exists() and (place / "node-1").exists())
    time.sleep(0.2)
    driver.send_signal(sent)
    assert driver.wait(20) == (75 if sent == signal.SIGTERM else -9)
    for node in range(2):
        pid = int(str(seen(place, node)["pid"]))
        until(lambda pid=pid: not psutil.pid_exists(pid))
