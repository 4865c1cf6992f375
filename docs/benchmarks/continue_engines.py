"""A run begun under DeepSpeed ZeRO-2 on two ranks, killed, continued natively on four ranks with FSDP: against an unbroken one.

    python docs/benchmarks/continue_engines.py --work /tmp/engines --shakespeare data/tinyshakespeare/input.txt

Trains the model of configs/shakespeare_char.yaml for some steps on tiny Shakespeare, by the command line. The unbroken run is
one process of the native engine. The other gets SIGKILL, launcher and ranks alike, when it has gone some steps beyond a
checkpoint; then the same run is started again with four shards and the native engine. Writes continue_engines.json beside this
file: commands, where it was killed, whether every step of both runs read the same samples with the same tokens (each process
notes them, see tests/recorded.py), the largest difference of losses, gradient norms and exported weights, and the loss of both
exported models on the end of the text, as `distllm eval` tells it. Fails when the order differs or a difference passes its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.kill_sweep import alive, children  # noqa: E402
from tests.recorded import read  # noqa: E402

STEPS, EVERY, BEYOND = 40, 10, 5
LOSSES, WEIGHTS = 2e-6, 1e-5
"""What may differ: fp32 rounds losses of about 4 by 5e-7; Adam makes steps of rounding where a gradient is nearly nothing."""
SMALL = (
    f"train.steps={STEPS}", "train.global_batch=12", "train.micro_batch=3", "train.log_every=1", "train.eval_every=0",
    "train.sample_every=0", "train.sample_tokens=0", f"checkpoint.every={EVERY}", "checkpoint.keep=10", "schedule.warmup=5",
    "train.threads=1", "precision.compute=fp32", "device=cpu",
)  # fmt: skip


def environment(record: Path | None) -> dict[str, str]:
    told = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | told | ({} if record is None else {"DISTLLM_RECORDED": str(record)})


def start(words: list[str], record: Path) -> subprocess.Popen[bytes]:
    """`distllm train`, noting what it reads."""
    print("distllm", " ".join(words), flush=True)
    with record.with_suffix(".log").open("ab") as log:
        command = [sys.executable, "-m", "tests.recorded", *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(record), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen[bytes], record: Path) -> None:
    if code := process.wait():
        raise SystemExit(f"it ended with {code}; see {record.with_suffix('.log')}")


def distllm(*words: str) -> str:
    print("distllm", " ".join(words), flush=True)
    command = [sys.executable, "-m", "distllm", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(None), check=True, capture_output=True, text=True).stdout


def lines(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> its figures; a step that was taken twice counts as it was taken last."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for text in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that is being written, or that a kill cut
                line = json.loads(text)
                if "loss" in line:
                    found[line["step"]] = line
    return found


def kill_beyond(process: subprocess.Popen[bytes], run: Path, *, checkpoint: int, step: int) -> dict[str, object]:
    """SIGKILL to the launcher and every rank, once a checkpoint is whole and a later step is told.

    Returns:
        Where it was.
    """
    whole = run / "checkpoints" / f"step-{checkpoint}"
    while max(lines(run), default=0) < step or not whole.is_dir():
        if process.poll() is not None:
            raise SystemExit(f"it ended with {process.returncode} before it could be killed")
        time.sleep(0.002)
    ranks = children(process.pid)
    for pid in (process.pid, *ranks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(map(alive, ranks)):
        time.sleep(0.01)
    last = max(lines(run))
    kept = sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*"))
    assert last < STEPS and process.returncode == -signal.SIGKILL
    return {"processes killed": 1 + len(ranks), "last step told": last, "checkpoints": kept}


def same_samples(records: Path) -> dict[str, object]:
    """Whether every step of the broken run, before the kill and after, read what the same step of the unbroken one read."""
    whole, before, after = (read(records / name) for name in ("unbroken", "killed", "continued"))
    assert len(whole) == STEPS and (set(before) | set(after)) >= set(whole)
    for name, part in (("killed", before), ("continued", after)):
        for step, rows in part.items():
            if step == max(part) and name == "killed" and rows.items() <= whole[step].items():
                continue  # the kill may have met a rank before that step
            assert rows == whole[step], f"{name}: samples {step[0]} to {step[1] - 1} differ"
    return {
        "steps compared": len(whole), "taken before the kill": len(before), "taken after it": len(after),
        "taken twice": len(set(before) & set(after)), "equal": True,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder for runs and tokens")
    parser.add_argument("--shakespeare", type=Path, required=True, help="the text of tiny Shakespeare")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    work, text = args.work.resolve(), args.shakespeare.resolve()
    work.mkdir(parents=True)
    where = [f"data.sources.0.path={text}", f"out={work}/runs", f"data.store={work}/store"]
    common = ["train", "configs/shakespeare_char.yaml", *where, *SMALL]
    zero = ["engine.name=deepspeed", "engine.zero_stage=2", "layout.dp_shard=2"]
    commands = {
        "unbroken": [*common, "name=unbroken", "layout.dp_shard=1"],
        "killed": [*common, "name=broken", *zero],
        "continued": [*common, "name=broken", "layout.dp_shard=4"],
    }
    finish(start(commands["unbroken"], work / "unbroken"), work / "unbroken")
    run = work / "runs" / "broken"
    killed = kill_beyond(start(commands["killed"], work / "killed"), run, checkpoint=EVERY, step=EVERY + BEYOND)
    finish(start(commands["continued"], work / "continued"), work / "continued")

    mine, theirs = lines(run), lines(work / "runs" / "unbroken")
    assert set(mine) == set(theirs) == set(range(1, STEPS + 1))
    losses = max(abs(mine[step]["loss"] - theirs[step]["loss"]) for step in theirs)
    norms = max(abs(mine[step]["grad_norm"] / theirs[step]["grad_norm"] - 1.0) for step in theirs)
    end = work / "end.txt"
    end.write_text(text.read_text(encoding="utf-8")[-50_000:], encoding="utf-8")
    evaluated, weights = {}, []
    for name in ("unbroken", "broken"):
        distllm("export", f"{work}/runs/{name}", f"{work}/{name}-hf")
        told = distllm("eval", f"{work}/{name}-hf", "--text", str(end), "--device", "cpu")
        evaluated[name] = float(re.search(r"loss\s+([0-9.]+)", told).group(1))  # type: ignore[union-attr]
        weights.append(load_file(work / f"{name}-hf" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    apart = max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0])
    record = {
        "date": str(date.today()), "machine": platform.machine(), "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("distllm", "torch", "deepspeed", "transformers")},
        "command": "python docs/benchmarks/continue_engines.py --work WORK --shakespeare INPUT.TXT",
        "commands": {name: f"distllm {' '.join(words)}" for name, words in commands.items()},
        "kill": killed, "samples": same_samples(work), "bounds": {"loss": LOSSES, "weight": WEIGHTS},
        "largest difference": {"loss": losses, "gradient norm, relative": norms, "exported weight": apart},
        "losses, unbroken": {step: theirs[step]["loss"] for step in (1, EVERY, STEPS)},
        "loss of the export on the last 50,000 characters": evaluated,
    }  # fmt: skip
    told = json.dumps(record, indent=2).replace(str(work), "WORK").replace(str(text), "INPUT.TXT")
    args.out.write_text(told + "\n")
    print(told)
    assert losses <= LOSSES and apart <= WEIGHTS, "a difference is above its bound"


if __name__ == "__main__":
    main()
