"""Kill a small run at random moments, start it again until it ends, and compare it with an unbroken one.

    python tests/kill_sweep.py [--kills 50] [--ranks 2] [--seed 1] [--out docs/benchmarks/kill_sweep.json]

At least half of the kills come inside a save: a save that this attempt began, known by its `.tmp-step-` folder, lies
unfinished in the moment of the kill. With several ranks a kill takes one rank or the launcher, by chance. After every
kill: each folder with a checkpoint's name must verify, the newest good step may not have gone back, and no fewer good ones
may be there than before, up to `checkpoint.keep`. When a run comes to its end before the kills are used up, the next one
starts in a new folder. At the end of every run the losses of all steps must be bitwise those of the unbroken run, and
nothing may have been set aside as bad. Prints a line a kill and a JSON record; exits 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distllm.checkpoint.find import candidates, check
from distllm.config.errors import CheckpointError

LOOK_S = 0.0005  # a save of the run takes about a hundred milliseconds
KEEP = 2
SIZES = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """What one kill met, and what it left."""

    number: int
    run: str
    victim: str
    after_s: float
    """Seconds since the attempt was started."""
    inside_a_save: bool
    good_steps: list[int]


def write_config(root: Path, *, ranks: int, steps: int) -> Path:
    """The config of a byte-level Llama of 2.8 million parameters that saves every second step, and its text."""
    numbers = random.Random(7)
    words = ["".join(numbers.choices("abcdefghij", k=numbers.randint(2, 5))) for _ in range(40)]
    lines = [" ".join(numbers.choices(words, k=60)) for _ in range(60)]
    (root / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    config = {
        "out": str(root), "model": {"type": "llama", "sizes": SIZES}, "layout": {"dp_shard": ranks},
        "data": {
            "sources": [{"kind": "text", "path": str(root / "text.txt"), "document": "paragraph"}],
            "tokenizer": {"kind": "bytes"}, "seq_len": 32, "store": str(root / "store"), "workers": 1,
            "validation": {"fraction": 0.1},
        },
        "train": {
            "steps": steps, "global_batch": 4, "micro_batch": 2, "log_every": 1, "eval_every": 0, "eval_batches": 1,
            "sample_tokens": 2, "threads": 1,
        },
        "optim": {"lr": 0.001}, "schedule": {"warmup": 2}, "checkpoint": {"every": 2, "keep": KEEP},
    }  # fmt: skip
    file = root / "config.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return file


def start(config: Path, name: str) -> subprocess.Popen[bytes]:
    """One attempt, in a session of its own."""
    command = [sys.executable, "-m", "distllm", "train", str(config), f"name={name}", "device=cpu"]
    with (config.parent / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def unfinished(folder: Path) -> set[str]:
    """Saves that have begun and not ended."""
    try:
        return {n for n in os.listdir(folder) if n.startswith(".tmp-step-")}
    except FileNotFoundError:
        return set()


def good_steps(folder: Path) -> tuple[list[int], list[str]]:
    """The steps of the checkpoints that verify, and what is wrong with the others."""
    good, torn = set(), []
    for step, path in candidates(folder):
        try:
            check(path)
            good.add(step)
        except CheckpointError as error:
            torn.append(str(error))
    return sorted(good), torn


def children(pid: int) -> list[int]:
    """The processes that a process has started: a launcher's ranks."""
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill(process: subprocess.Popen[bytes], folder: Path, *, ranks: int, numbers: random.Random) -> tuple[str, set[str]]:
    """Kill one process of the attempt and wait for the end of all of them.

    Returns:
        Which it was, and the saves that were unfinished in that moment.
    """
    of_run = children(process.pid) if ranks > 1 else []
    victim = numbers.randrange(len(of_run) + 1)
    pid, name = (process.pid, "launcher" if ranks > 1 else "process")
    if victim < len(of_run):
        pid, name = of_run[victim], f"rank {victim}"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while alive(pid):
        time.sleep(LOOK_S)
    left = unfinished(folder)  # at once: a rank that lives on may yet remove the save that cannot be finished
    try:
        process.wait(60.0)  # the launcher ends the other ranks
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{name} was killed, and the other ranks still live after 60 s") from None
    deadline = time.monotonic() + 60.0
    while any(alive(rank) for rank in of_run):
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} was killed, and ranks still live after 60 s")
        time.sleep(0.01)
    return name, left


def wait_for_save(process: subprocess.Popen[bytes], folder: Path, number: int) -> bool:
    """Wait until the `number`-th save of this attempt has begun; False when the process ends first."""
    seen = unfinished(folder)
    while process.poll() is None:
        new = unfinished(folder) - seen
        seen |= new
        number -= len(new)
        if number <= 0 and new:
            return True
        time.sleep(LOOK_S)
    return False


def wait_at_random(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Let the process run for so long; False when it ends first."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def losses(run: Path) -> dict[int, str]:
    """Step -> loss, as it was written; a step that was taken twice counts as it was taken last."""
    result = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a kill cut
        if "step" in values and "loss" in values:
            result[int(values["step"])] = repr(values["loss"])
    return result


class Sweep:
    """The kills so far, and every promise that was broken."""

    def __init__(self, config: Path, *, kills: int, ranks: int, seed: int) -> None:
        self._config, self._root, self._wanted_kills, self._ranks = config, config.parent, kills, ranks
        self._numbers = random.Random(seed)
        self.kills: list[Kill] = []
        self.problems: list[str] = []
        self.runs = 0
        begin = time.monotonic()
        if start(config, "unbroken").wait() != 0:
            raise SystemExit(f"the unbroken run failed; see {self._root / 'unbroken.log'}")
        self.seconds = time.monotonic() - begin
        self.losses = losses(self._root / "unbroken")

    @property
    def inside(self) -> int:
        return sum(kill.inside_a_save for kill in self.kills)

    def run_all(self) -> None:
        while len(self.kills) < self._wanted_kills and not self.problems:
            self.runs += 1
            self._one_run(f"broken-{self.runs}")

    def _one_run(self, name: str) -> None:
        """One run from its first start to its end, with kills as long as there are any left."""
        folder = self._root / name / "checkpoints"
        good: list[int] = []
        while True:
            process, begin, before = start(self._config, name), time.monotonic(), unfinished(folder)
            if not self._moment(process, folder):
                break
            after = time.monotonic() - begin
            victim, left = kill(process, folder, ranks=self._ranks, numbers=self._numbers)
            good = self._look(Kill(len(self.kills) + 1, name, victim, round(after, 2), bool(left - before), []), folder, good)
            if self.problems:
                return
        if process.returncode != 0:
            self.problems.append(f"{name} ended with {process.returncode}; see {self._root / name}.log")
            return
        got = losses(self._root / name)
        for step in [step for step in self.losses if got.get(step) != self.losses[step]][:1]:
            self.problems.append(f"{name}: the loss differs first at step {step}: {got.get(step)}, {self.losses[step]}")
        self.problems += [f"{name}: {p.name} was set aside" for p in folder.iterdir() if p.name.startswith("bad-")]

    def _moment(self, process: subprocess.Popen[bytes], folder: Path) -> bool:
        """Wait for the moment of the next kill; False when the run ends before it."""
        if len(self.kills) >= self._wanted_kills:
            if wait_at_random(process, 10 * self.seconds + 120):
                raise SystemExit(f"a run hangs; see the logs in {self._root}")
            return False
        if self.inside * 2 > len(self.kills):
            return wait_at_random(process, self._numbers.uniform(0.25, 1.0) * self.seconds)
        begun = wait_for_save(process, folder, self._numbers.randrange(1, 4))
        time.sleep(self._numbers.random() * 0.06 if begun else 0)
        return begun

    def _look(self, kill: Kill, folder: Path, before: list[int]) -> list[int]:
        """Check the promises after a kill and note it; returns the good steps."""
        good, torn = good_steps(folder)
        kill = Kill(**{**asdict(kill), "good_steps": good})
        self.kills.append(kill)
        told = f"kill {kill.number}"
        self.problems += [f"{told}: torn under a checkpoint's name: {one}" for one in torn]
        if max(good, default=-1) < max(before, default=-1):
            self.problems.append(f"{told}: a checkpoint was lost: good steps were {before}, are {good}")
        if len(good) < min(KEEP, len(before)):
            self.problems.append(f"{told}: too few are left: good steps were {before}, are {good}")
        where = "inside a save" if kill.inside_a_save else "elsewhere"
        print(f"{told}/{self._wanted_kills}: {kill.victim}, {where}, after {kill.after_s} s; good steps {good}", flush=True)
        return good


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def record(sweep: Sweep, *, seconds: float) -> dict[str, Any]:
    last = max(sweep.losses)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python tests/kill_sweep.py " + " ".join(sys.argv[1:]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_at_end": round(os.getloadavg()[0], 2)},
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "kills": len(sweep.kills), "inside_a_save": sweep.inside, "runs": sweep.runs, "problems": sweep.problems,
        "bitwise_equal": not sweep.problems, "final_step": last, "final_loss": sweep.losses[last],
        "losses_compared_a_run": len(sweep.losses), "seconds_unbroken": round(sweep.seconds, 1),
        "seconds": round(seconds, 1), "raw": [asdict(kill) for kill in sweep.kills],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1, help="over which the state is sharded")
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="where to run; default: the temporary folder")
    parser.add_argument("--out", type=Path, default=None, help="where to put the record")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders")
    asked = parser.parse_args()
    root, begin = Path(tempfile.mkdtemp(prefix="kill-sweep-", dir=asked.folder)), time.monotonic()
    config = write_config(root, ranks=asked.ranks, steps=asked.steps)
    sweep = Sweep(config, kills=asked.kills, ranks=asked.ranks, seed=asked.seed)
    sweep.run_all()
    result = record(sweep, seconds=time.monotonic() - begin)
    if sweep.inside * 2 < len(sweep.kills):
        sweep.problems.append(f"only {sweep.inside} of {len(sweep.kills)} kills were inside a save")
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "raw"}, indent=1))
    if sweep.problems or asked.keep:
        print(f"the runs are in {root}")
    else:
        shutil.rmtree(root)
    sys.exit(bool(sweep.problems))


if __name__ == "__main__":
    main()
