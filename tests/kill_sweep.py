"""Kill a run at random moments, start it again until it ends, and compare it with an unbroken one.

    python tests/kill_sweep.py CONFIG [key=value ...] [--kills 50] [--seed 1]

The config should save every few steps. Every second kill comes inside a save, which is known by a `.tmp-step-` folder that
is there when the process is dead. After every kill: each folder with a checkpoint's name must verify, and the newest good
step may not have gone back. When a run comes to its end before the kills are used up, the next one starts in a new folder.
At the end of every run the losses of all steps must be bitwise those of the unbroken run. Prints one JSON object; exits 1
when a promise is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distllm.checkpoint.find import candidates, check
from distllm.config.errors import CheckpointError

LOOK_S = 0.001  # a save of a small run takes some ten milliseconds


def start(asked: argparse.Namespace, root: Path, name: str) -> subprocess.Popen[bytes]:
    """One attempt, in a session of its own, so that a kill takes all its ranks."""
    log = (root / f"{name}.log").open("ab")
    command = [sys.executable, "-m", "distllm", "train", asked.config, *asked.overrides, f"out={root}", f"name={name}"]
    with log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def unfinished(folder: Path) -> list[str]:
    """Saves that have begun and not ended."""
    try:
        return sorted(n for n in os.listdir(folder) if n.startswith(".tmp-step-"))
    except FileNotFoundError:
        return []


def good_steps(folder: Path) -> tuple[set[int], list[str]]:
    """The steps of the checkpoints that verify, and what is wrong with the others."""
    good, torn = set(), []
    for step, path in candidates(folder):
        try:
            check(path)
            good.add(step)
        except CheckpointError as error:
            torn.append(str(error))
    return good, torn


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_save(process: subprocess.Popen[bytes], folder: Path, number: int) -> bool:
    """Wait until the `number`-th save of this attempt has begun; False when the process ends first."""
    seen = set(unfinished(folder))
    while process.poll() is None:
        new = set(unfinished(folder)) - seen
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


def sweep(asked: argparse.Namespace, root: Path) -> dict[str, object]:
    numbers = random.Random(asked.seed)
    begin = time.monotonic()
    process = start(asked, root, "unbroken")
    if process.wait() != 0:
        raise SystemExit(f"the unbroken run failed; see {root / 'unbroken.log'}")
    seconds = time.monotonic() - begin
    wanted = losses(root / "unbroken")
    result: dict[str, object] = {"seconds_unbroken": round(seconds, 1), "losses_compared": len(wanted)}
    kills, inside, runs, problems = 0, 0, 0, []
    while kills < asked.kills and not problems:
        runs += 1
        name, newest = f"broken-{runs}", -1
        folder = root / name / "checkpoints"
        while True:
            process = start(asked, root, name)
            if kills >= asked.kills:
                alive = wait_at_random(process, 10 * seconds + 60)
            elif inside * 2 <= kills:
                alive = wait_for_save(process, folder, numbers.randrange(1, 4))
                time.sleep(numbers.random() * asked.save_s if alive else 0)
            else:
                alive = wait_at_random(process, numbers.uniform(0.2, 1.0) * seconds)
            if not alive:
                break
            kill(process)
            kills += 1
            inside += bool(unfinished(folder))
            good, torn = good_steps(folder)
            problems += [f"kill {kills}: torn under a checkpoint's name: {one}" for one in torn]
            if max(good, default=-1) < newest:
                problems.append(f"kill {kills}: newest good step was {newest}, is {max(good, default=None)}")
            newest = max(good, default=-1)
        if process.returncode != 0:
            problems.append(f"{name} ended with {process.returncode}; see {root / name}.log")
            break
        got = losses(root / name)
        differ = [step for step in wanted if got.get(step) != wanted[step]]
        if differ:
            problems.append(f"{name}: the loss differs first at step {differ[0]}: {got.get(differ[0])}, {wanted[differ[0]]}")
        problems += [f"{name}: {p.name}" for p in folder.iterdir() if p.name.startswith("bad-")]
    last = max(wanted)
    return {
        **result, "kills": kills, "inside_a_save": inside, "runs": runs, "problems": problems,
        "final_step": last, "final_loss": wanted[last], "bitwise_equal": not problems,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value, as for train")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-s", type=float, default=0.03, help="about how long a save takes; kills are spread over it")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders")
    asked = parser.parse_intermixed_args()
    root = Path(tempfile.mkdtemp(prefix="kill-sweep-"))
    result = sweep(asked, root)
    if result["problems"] or asked.keep:
        result["folder"] = str(root)
    else:
        shutil.rmtree(root)
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["problems"]))


if __name__ == "__main__":
    main()
