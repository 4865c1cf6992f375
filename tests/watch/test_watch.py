"""A rank that dies, stops or stands still in the middle of a step: the others end, one line says which, and nothing is lost.

The collectives' own time limit is an hour here: a rank that is not noticed by the watch makes the test fail by its time-out.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.runs import losses, tiny_config

LIMIT_S = 100.0
pytestmark = pytest.mark.timeout(400)  # processes of several seconds each, on a machine that may be busy
SETTINGS = (
    "device=cpu", "train.timeout_s=3600", "train.lost_s=3", "train.stall_s=4", "train.micro_batch=4",
    "train.global_batch=null", "train.accumulation=1", "train.eval_every=0", "train.sample_tokens=0", "train.steps=8",
    "checkpoint.every=2", "checkpoint.asynchronous=false", "data.cross_documents=true",
)  # fmt: skip
MODEL = ("model.type=null", "model.sizes={}", "model.spec=tests.watch.victim:victim")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_config(tmp_path)
    return tmp_path


def command(folder: Path, *settings: str, ranks: int = 2, launcher: tuple[str, ...] = ()) -> list[str]:
    start = launcher or (sys.executable,)
    own = () if launcher else ("--processes", str(ranks))
    return [*start, "-m", "distllm", "train", str(folder / "tiny.yaml"), *MODEL, *SETTINGS, *settings, *own]


def run(folder: Path, argv: list[str], *, victim: str = "-1 0 never", how: str = "") -> subprocess.CompletedProcess[str]:
    """Run to the end; whatever is left after `LIMIT_S` is killed, and the test fails."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]), "VICTIM": victim, "VICTIM_HOW": how, "VICTIM_ONCE": str(folder / "once"),
        "OMP_NUM_THREADS": "1", "TMPDIR": str(folder),
    }  # fmt: skip
    process = subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    seen: list[psutil.Process] = []
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        seen = psutil.Process(process.pid).children(recursive=True)
        raise
    finally:
        for child in seen:
            child.kill()
        if process.poll() is None:
            process.kill()
            process.wait()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("distllm: ")]


def no_rank_is_left(folder: Path) -> bool:
    config = str(folder / "tiny.yaml")
    return not any(config in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


SHARDED, REPLICATED = "layout.dp_shard=2", "layout.dp_replicate=2"
KILLED = "was ended by SIGKILL (often: the machine is out of memory) at step 6"


@pytest.mark.parametrize(
    ("layout", "victim", "how", "code", "what"),
    [
        (REPLICATED, "0 6 backward", "SIGKILL", 137, KILLED),
        (SHARDED, "0 6 forward", "SIGSTOP", 7, "was stopped by a signal at step 6"),
        (REPLICATED, "1 6 forward", "sleep", 7, "has not moved for 4 s at step 6, in the forward pass, at watch/victim.py:"),
    ],
)
def test_the_rank_that_holds_up_the_others_is_named_once(
    folder: Path, layout: str, victim: str, how: str, code: int, what: str
) -> None:
    done = run(folder, command(folder, layout), victim=victim, how=how)
    assert_told(folder, done, victim=int(victim[0]), what=what, collective="all_reduce" if layout == REPLICATED else "all_gather")
    assert done.returncode == code


def test_the_same_command_goes_on_with_the_same_losses(folder: Path) -> None:
    assert run(folder, command(folder, SHARDED, "name=whole")).returncode == 0
    done = run(folder, command(folder, SHARDED), victim="1 6 forward", how="SIGKILL")
    assert_told(folder, done, victim=1, what=KILLED, collective="all_gather")
    assert done.returncode == 137
    again = run(folder, command(folder, SHARDED))
    assert again.returncode == 0 and "continuing at step 4 from " in again.stderr and not told(again)
    assert losses(folder / "runs/tiny") == losses(folder / "runs/whole")


def assert_told(folder: Path, done: subprocess.CompletedProcess[str], *, victim: int, what: str, collective: str) -> None:
    """One line names the rank, the step, and the collective that the other rank waits in; it is in one rank's log too."""
    assert len(told(done)) == 1, done.stderr
    line = told(done)[0]
    assert line.startswith(f"distllm: rank {victim} (host {os.uname().nodename}) {what}")
    phase = "backward" if collective == "all_reduce" else "forward"  # DDP waits at the end, FSDP before each block
    waits = f"; rank {1 - victim} waits for it in the {phase} pass, in {collective} #[1-9][0-9]* of all ranks; "
    assert re.search(waits, line), line
    assert line.endswith("; the same command goes on from step-4")
    logs = [path.read_text() for path in (folder / "runs/tiny/logs").glob("rank-*.log")]
    assert sum(line.removeprefix("distllm: ") in log for log in logs) == 1
    assert no_rank_is_left(folder)


def test_an_error_of_one_rank_is_told_and_the_others_are_quiet(folder: Path) -> None:
    done = run(folder, command(folder, SHARDED), victim="1 6 forward", how="raise")
    assert told(done) == ["distllm: text.txt, line 7: bad"], done.stderr
    assert done.returncode == 3 and no_rank_is_left(folder)


def test_a_fault_of_one_rank_is_told_and_the_others_are_quiet(folder: Path) -> None:
    done = run(folder, command(folder, REPLICATED), victim="0 6 backward", how="bug")
    assert len(told(done)) == 1 and told(done)[0].startswith("distllm: unexpected error: KeyError: 'x'; "), done.stderr
    assert done.returncode == 1 and no_rank_is_left(folder)


def test_a_first_step_may_take_long(folder: Path) -> None:
    done = run(folder, command(folder, REPLICATED, "train.stall_s=1", "train.steps=4"), victim="1 1 forward", how="slow")
    assert done.returncode == 0 and not told(done) and (folder / "once").exists(), done.stderr


def test_under_torchrun_too(folder: Path) -> None:
    address = ("--master-addr=127.0.0.1", f"--master-port={free_port()}")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *address)
    done = run(folder, command(folder, REPLICATED, launcher=torchrun), victim="1 6 forward", how="SIGSTOP")
    assert_told(folder, done, victim=1, what="was stopped by a signal at step 6", collective="all_reduce")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
