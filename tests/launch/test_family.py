"""A launcher and all below it: a request reaches the ranks and not the launcher, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from distllm.launch.family import _members

DRIVER = """
import os, sys
from distllm.launch.family import Request, run_family
request = Request()
with request.caught():
    sys.exit(run_family([sys.executable, sys.argv[1]], environment=os.environ, request=request, grace_s=0.5))
"""
# A launcher as deepspeed's: a front process, another below it in a session of its own, and the ranks below that.
LAUNCHER = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(os.environ["STUB_FOLDER"])
level = int(os.environ.get("LEVEL", "0"))
def ready(name):
    (folder / f"{name}.tmp").write_text(str(os.getpid()))
    (folder / f"{name}.tmp").rename(folder / name)
if level < 2:
    copies = 2 if level == 1 else 1
    children = [subprocess.Popen([sys.executable, __file__], env=os.environ | {"LEVEL": str(level + 1), "ME": str(i)},
                start_new_session=True) for i in range(copies)]
    ready(f"level-{level}")
    codes = [child.wait() for child in children]
    sys.exit(next((code for code in codes if code), 0))
me = os.environ["ME"]
BODY
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("STUB_FOLDER", str(tmp_path))
    return tmp_path


def start(folder: Path, body: str) -> subprocess.Popen[str]:
    (folder / "launcher.py").write_text(LAUNCHER.replace("BODY", textwrap.dedent(body)))
    command = [sys.executable, "-c", DRIVER, str(folder / "launcher.py")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)


def until(happened: object, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def gone(folder: Path) -> bool:
    pids = [int(path.read_text()) for path in folder.iterdir() if path.suffix == "" and path.name.startswith(("level", "rank"))]
    return all(not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in pids)


def ranks_ready(folder: Path) -> bool:
    return (folder / "rank-0").exists() and (folder / "rank-1").exists()


WAITING = """
def stop(number, frame):
    (folder / f"got-{me}").write_text(signal.Signals(number).name)
    time.sleep(0.3)  # saving
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
ready(f"rank-{me}")
while True:
    time.sleep(0.02)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_request_reaches_every_rank_as_sigusr1_and_they_may_take_their_time(stub: Path, sent: signal.Signals) -> None:
    driver = start(stub, WAITING)
    until(lambda: ranks_ready(stub))
    driver.send_signal(sent)
    assert driver.communicate(timeout=20)[1] == "" and driver.returncode == 75
    assert [(stub / f"got-{rank}").read_text() for rank in range(2)] == ["SIGUSR1", "SIGUSR1"]
    until(lambda: gone(stub))


def test_a_rank_that_is_not_ready_yet_is_asked_again(stub: Path) -> None:
    driver = start(stub, 'ready(f"early-{me}"); time.sleep(1.5)\n' + textwrap.dedent(WAITING))
    until(lambda: (stub / "early-0").exists() and (stub / "early-1").exists())
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(20) == 75
    assert driver.stderr is not None
    driver.stderr.close()


def test_a_second_interrupt_kills_all(stub: Path) -> None:
    body = 'signal.signal(signal.SIGUSR1, lambda *_: ready(f"got-{me}"))\nready(f"rank-{me}")\nwhile True: time.sleep(0.02)'
    driver = start(stub, body)
    until(lambda: ranks_ready(stub))
    driver.send_signal(signal.SIGINT)
    until(lambda: (stub / "got-0").exists() and (stub / "got-1").exists())
    driver.send_signal(signal.SIGINT)
    assert driver.wait(20) == 130
    until(lambda: gone(stub))
    assert driver.stderr is not None
    driver.stderr.close()


def test_what_a_launcher_leaves_behind_is_ended(stub: Path) -> None:
    body = 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready(f"rank-{me}")\nwhile True: time.sleep(0.02)'
    driver = start(stub, body)
    until(lambda: ranks_ready(stub))
    os.kill(int((stub / "level-0").read_text()), signal.SIGKILL)
    assert driver.wait(20) == 137
    until(lambda: gone(stub))
    assert driver.stderr is not None
    driver.stderr.close()


def test_what_does_not_save_ends_at_the_first_request(stub: Path) -> None:
    """A bench has no handler for SIGUSR1, and inherits that its launcher ignores it."""
    (stub / "launcher.py").write_text(LAUNCHER.replace("BODY", 'ready(f"rank-{me}")\nwhile True: time.sleep(0.02)'))
    code = DRIVER.replace("Request()", "Request(saves=False)")
    driver = subprocess.Popen([sys.executable, "-c", code, str(stub / "launcher.py")], process_group=0)
    until(lambda: ranks_ready(stub))
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(20) == 130
    until(lambda: gone(stub))


def test_a_process_of_another_with_an_ill_name_does_not_matter(tmp_path: Path) -> None:
    """Linux cuts a process's name after 15 bytes, in the middle of a character too."""
    name = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'fourteen-bytes\\xc3', 0, 0, 0); print(flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", name], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        assert other.pid in _members()
    finally:
        other.kill()
        other.communicate()
