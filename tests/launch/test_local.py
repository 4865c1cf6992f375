"""Ranks of one machine: what they are told, how they end together, and that none is left behind."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from distllm.launch import local_commands, local_ranks

STUB = """
import os, signal, subprocess, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
folder = Path(os.environ["STUB_FOLDER"])
def ready():
    (folder / f"pid-{rank}.tmp").write_text(str(os.getpid()))
    (folder / f"pid-{rank}.tmp").rename(folder / f"pid-{rank}")
def forever():
    while True:
        time.sleep(0.02)  # not pause(): a signal just before it would be waited for in vain
def note(number, frame):
    with (folder / f"signals-{rank}").open("a") as file:
        file.write(signal.Signals(number).name + "\\n")
"""
DRIVER = "import sys; from distllm.launch import local_ranks; sys.exit(local_ranks(sys.argv[2:], int(sys.argv[1]), module='stub_rank', grace_s=0.3))"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    monkeypatch.setenv("STUB_FOLDER", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def program(folder: Path, body: str) -> None:
    (folder / "stub_rank.py").write_text(STUB + textwrap.dedent(body))


def started(folder: Path, count: int) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A launcher process and the ids of its ranks, all of them past their `ready()`."""
    launcher = subprocess.Popen([sys.executable, "-c", DRIVER, str(count)], stderr=subprocess.PIPE)
    until(lambda: all((folder / f"pid-{rank}").exists() for rank in range(count)))
    return launcher, [int((folder / f"pid-{rank}").read_text()) for rank in range(count)]


def until(happened: object, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_each_rank_is_told_who_it_is(stub: Path) -> None:
    program(
        stub,
        """
        store = os.environ["DISTLLM_INIT_METHOD"].removeprefix("file://")
        assert Path(store).parent.is_dir() and not Path(store).exists()
        names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
        (folder / f"seen-{rank}").write_text(" ".join([*sys.argv[1:], *(os.environ[n] for n in names), store]))
        assert os.getpgid(0) == os.getpid()
        """,
    )
    assert local_ranks(["train", "a b.yaml"], 2, module="stub_rank") == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    seen = [(stub / f"seen-{rank}").read_text() for rank in range(2)]
    assert [text.rpartition(" ")[0] for text in seen] == [f"train a b.yaml {rank} 2 2 {threads}" for rank in range(2)]
    stores = {text.rpartition(" ")[2] for text in seen}
    assert len(stores) == 1 and not Path(stores.pop()).parent.exists()  # one store for both, cleared away


def test_the_users_thread_count_stands(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    program(stub, "sys.exit(0 if os.environ['OMP_NUM_THREADS'] == '7' else 1)")
    assert local_ranks([], 2, module="stub_rank") == 0


def test_the_printed_commands_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert local_commands(["train", "a b.yaml"], 1) == [shlex.join([sys.executable, "-m", "distllm", "train", "a b.yaml"])]
    lines = [shlex.split(line) for line in local_commands(["train", "a b.yaml"], 2)]
    assert [line[:5] for line in lines] == [["env", f"RANK={r}", f"LOCAL_RANK={r}", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=2"] for r in range(2)]
    assert [line[-4:] for line in lines] == [["-m", "distllm", "train", "a b.yaml"]] * 2


@pytest.mark.parametrize(("codes", "code"), [("0 0", 0), ("75 75", 75), ("0 75", 75), ("0 3", 3), ("4 4", 4)])
def test_the_code_of_the_ranks(stub: Path, codes: str, code: int) -> None:
    program(stub, "sys.exit(int(sys.argv[1].split()[rank]))")
    assert local_ranks([codes], 2, module="stub_rank") == code


def test_when_one_rank_fails_the_others_are_ended(stub: Path) -> None:
    program(
        stub,
        """
        if rank == 1:
            while not (folder / "pid-0").exists() or not (folder / "pid-2").exists():
                time.sleep(0.01)
            sys.exit(5)
        signal.signal(signal.SIGTERM, note)  # asked to stop, it hangs on: its partner is gone
        ready()
        while True:
            time.sleep(0.01)
        """,
    )
    assert local_ranks([], 3, module="stub_rank", grace_s=0.3) == 5
    assert all(gone(int((stub / f"pid-{rank}").read_text())) for rank in (0, 2))
    assert (stub / "signals-0").read_text() == "SIGTERM\n"


def test_a_rank_that_is_killed_is_told(stub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program(stub, "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else forever()")
    assert local_ranks([], 2, module="stub_rank") == 137
    line = "distllm: rank 1 was ended by SIGKILL (often: the machine is out of memory); the other ranks were stopped\n"
    assert capfd.readouterr().err == line


def test_what_a_rank_started_ends_with_it(stub: Path) -> None:
    program(
        stub,
        """
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        (folder / f"child-{rank}").write_text(str(child.pid))
        sys.exit(0)
        """,
    )
    assert local_ranks([], 2, module="stub_rank") == 0
    until(lambda: all(gone(int((stub / f"child-{rank}").read_text())) for rank in range(2)))


@pytest.mark.parametrize(
    ("sent", "seen"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGHUP, "SIGTERM")]
)
def test_a_signal_reaches_each_rank_once(stub: Path, sent: signal.Signals, seen: str) -> None:
    program(
        stub,
        """
        def stop(number, frame):
            note(number, frame)
            sys.exit(75)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, stop)
        ready()
        forever()
        """,
    )
    launcher, _ = started(stub, 2)
    launcher.send_signal(sent)
    assert launcher.wait(20) == 75
    assert [(stub / f"signals-{rank}").read_text() for rank in range(2)] == [f"{seen}\n"] * 2
    assert launcher.stderr is not None and launcher.stderr.read() == b""
    launcher.stderr.close()


def test_a_second_interrupt_kills(stub: Path) -> None:
    program(stub, "signal.signal(signal.SIGINT, note); ready(); forever()")
    launcher, ranks = started(stub, 2)
    launcher.send_signal(signal.SIGINT)
    until(lambda: all((stub / f"signals-{rank}").exists() for rank in range(2)))
    assert launcher.poll() is None  # they may save as long as they need
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) == 130
    assert all(gone(pid) for pid in ranks)
    assert launcher.stderr is not None
    launcher.stderr.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_ranks_die_when_the_launcher_is_killed(stub: Path) -> None:
    program(stub, "ready(); forever()")
    launcher, ranks = started(stub, 2)
    launcher.kill()
    launcher.wait(20)
    until(lambda: all(gone(pid) for pid in ranks))
    assert launcher.stderr is not None
    launcher.stderr.close()


def test_no_torch_is_imported() -> None:
    code = "import distllm.launch, sys; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
