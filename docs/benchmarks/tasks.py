"""What the shipped configs of tasks reach: SST-2, Multi30k, a pre-trained encoder, a student with and without its teacher.

    python docs/benchmarks/tasks.py --data data --encoder models/all-MiniLM-L6-v2            # everything
    python docs/benchmarks/tasks.py --data data --only sst2_words,multi30k_gru --work /tmp/tasks

Trains each with `distllm train` and measures it with `distllm eval` on the test set, as a user would. A run that is done in
the work folder is not trained again, so the script can be stopped and goes on. Writes tasks.json beside this file: for each
run what its summary.json says, the test figures, and the commands; for the pre-trained encoder what always answering the most
frequent token gets; for its fine-tunings, for the same from random weights, and for the students mean and spread over the
seeds. The confusion matrix that `distllm eval` draws of sst2_minilm is kept as a picture. `--data` holds sst2/, multi30k/,
wikitext2/ and tinyshakespeare/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import torch

import distllm
from distllm.config.check import resolve_layout
from distllm.data.batch import IGNORE
from distllm.data.loader import open_samples, validation_batches
from distllm.data.prepare import open_prepared
from distllm.train.inference import open_source

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = str(Path(sys.executable).parent / "distllm")
SEEDS = (1, 2, 3)
FEW = 1000
"""Sentences, the first of the training file, of the comparison where labels are few."""
RATES = ("5e-4", "1e-3", "2e-3", "4e-3")


@dataclass(frozen=True)
class Comparison:
    """A pre-trained encoder's fine-tunings, and those of the same encoder from random weights."""

    configs: str
    """The folder of configs that has pretrain, finetune and scratch; the tokenizer of both is that of pretrain."""
    seeds: tuple[int, ...]
    rates: tuple[str, ...]
    """What the learning rate of both was chosen from, by the mean validation accuracy of the first seeds."""
    chosen: dict[str, str]
    """The learning rate that was chosen for each; only there the test set is asked. The configs have those for all sentences."""
    tried: dict[str, int] = field(default_factory=lambda: {"finetune": 2, "scratch": 2})
    """By how many seeds."""
    few: bool = False
    """Whether the first FEW sentences are all."""

    def changes(self, work: Path) -> list[str]:
        """What a comparison on few sentences changes in its configs."""
        steps = ["train.steps=100", "schedule.warmup=10", "train.eval_every=20"]
        return [f"data.sources.0.path={work}/sst2_{FEW}.tsv", *steps] if self.few else []


COMPARISONS = {
    "encoder": Comparison("encoder", tuple(range(1, 13)), RATES, {"finetune": "2e-3", "scratch": "2e-3"}),
    "encoder_few": Comparison(
        "encoder", tuple(range(1, 11)), ("2.5e-4", *RATES), {"finetune": "5e-4", "scratch": "2e-3"}, few=True
    ),
    "byte_encoder": Comparison(
        "byte_encoder", tuple(range(1, 5)), ("2.5e-4", "5e-4", "1e-3", "2e-3"), {"finetune": "5e-4", "scratch": "1e-3"},
        tried={"finetune": 2, "scratch": 1},
    ),
}


def run(words: Sequence[str]) -> None:
    """Run a distllm command, which must end well; it may take hours."""
    print("distllm", " ".join(words), flush=True)
    subprocess.run([COMMAND, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def plans(data: Path, work: Path, encoder: str) -> dict[str, tuple[list[str], list[str]]]:
    """For each run the words of its training and, where there is a test set, of its evaluation."""
    sst2 = [f"data.sources.0.path={data}/sst2/train.tsv", f"data.validation.sources.0.path={data}/sst2/dev.tsv"]
    test = ["--which", "best", "--data", f"{data}/sst2/test.tsv", "--batch", "64"]
    pairs = [
        f"data.sources.0.path={data}/multi30k/train.de", f"data.sources.0.target_path={data}/multi30k/train.en",
        f"data.validation.sources.0.path={data}/multi30k/val.de", f"data.validation.sources.0.target_path={data}/multi30k/val.en",
    ]  # fmt: skip
    flickr = f"{data}/multi30k/test_2016_flickr"
    flickr_test = ["--data", f"{flickr}.de", "--target", f"{flickr}.en", "--batch", "64"]
    drama = [f"data.sources.0.path={data}/tinyshakespeare/input.txt"]
    texts = [
        f"data.sources.0.path={data}/wikitext2/valid.txt", f"data.sources.1.path={data}/wikitext2/test.txt",
        f"data.sources.2.path={data}/tinyshakespeare/input.txt",
    ]  # fmt: skip
    runs = work / "runs"
    made: dict[str, tuple[list[str], list[str]]] = {}
    for name in ("words", "lstm"):
        made[f"sst2_{name}"] = ([f"configs/sst2/{name}.yaml", *sst2], test)
    for name in ("minilm", "minilm_head"):
        made[f"sst2_{name}"] = ([f"configs/sst2/{name}.yaml", *sst2, f"model.path={encoder}"], test)
    for name in ("transformer", "gru"):
        made[f"multi30k_{name}"] = ([f"configs/multi30k/{name}.yaml", *pairs], flickr_test)
    starts = {
        "encoder": ("model.path={}", "data.tokenizer.path={}/tokenizer"),
        "byte_encoder": ("model.path={}", "data.tokenizer.kind=bytes"),
    }
    for folder in starts:
        made[f"{folder}_pretrain"] = ([f"configs/{folder}/pretrain.yaml", *texts], [])
    for comparison, these in COMPARISONS.items():
        for arm, start in zip(these.chosen, starts[these.configs], strict=True):
            first = start.format(runs / f"{these.configs}_pretrain")
            own = [f"configs/{these.configs}/{arm}.yaml", *sst2, first, *these.changes(work)]
            for rate, seed in product(these.rates, these.seeds):
                name, chosen = f"{comparison}_{arm}_lr_{rate}_{seed}", rate == these.chosen[arm]
                if chosen or seed in these.seeds[: these.tried[arm]]:
                    made[name] = ([*own, f"optim.lr={rate}", f"seed={seed}", f"name={name}"], test if chosen else [])
    made["shakespeare_char"] = (["configs/shakespeare_char.yaml", *drama], [])
    for seed in SEEDS:
        own = ["configs/distill/student.yaml", *drama, f"seed={seed}"]
        alone = ["distill.teacher=null", "distill.temperature=2.0", "distill.alpha=0.5"]
        made[f"student_{seed}"] = ([*own, f"name=student_{seed}", f"distill.teacher={runs}/shakespeare_char"], [])
        made[f"student_{seed}_alone"] = ([*own, f"name=student_{seed}_alone", *alone], [])
    return made


def most_frequent(folder: Path) -> dict[str, Any]:
    """What always answering the most frequent hidden token gets, on the validation samples that the run is measured on."""
    opened = open_source(str(folder), device="cpu")
    config = opened.config
    samples = open_samples(
        open_prepared(config), config, resolved=resolve_layout(config, 1), tokenizer=opened.tokenizer, decoder_start=None,
        token_types=opened.token_types,
    )  # fmt: skip
    counts = torch.zeros(len(opened.tokenizer), dtype=torch.int64)
    for batch in validation_batches(samples, micro_batch=64, dp_rank=0, dp_size=1, limit=0):
        labels = batch.targets["labels"]
        counts += torch.bincount(labels[labels != IGNORE], minlength=len(counts))
    best = int(counts.argmax())
    return {
        "token": opened.tokenizer.decode([best]), "accuracy": counts[best].item() / counts.sum().item(),
        "hidden_tokens": counts.sum().item(),
    }  # fmt: skip


def students(runs: dict[str, Any]) -> dict[str, Any]:
    """Validation losses with and without the teacher, over the seeds."""
    losses = {
        how: [runs[f"student_{seed}{ending}"]["summary"]["val_loss"] for seed in SEEDS]
        for how, ending in (("with the teacher", ""), ("alone", "_alone"))
    }
    return {how: {"losses": some, "mean": statistics.mean(some), "stdev": statistics.stdev(some)} for how, some in losses.items()}


def encoders(runs: dict[str, Any], comparison: str) -> dict[str, Any]:
    """Fine-tuned and from random weights: validation accuracies at each learning rate, test accuracies over the seeds.

    Args:
        runs: the record's.
        comparison: a name of COMPARISONS.
    """
    these, told = COMPARISONS[comparison], dict[str, Any]()
    for arm, chosen in these.chosen.items():
        tried = {
            rate: statistics.mean(
                runs[f"{comparison}_{arm}_lr_{rate}_{seed}"]["summary"]["best_value"] for seed in these.seeds[: these.tried[arm]]
            )
            for rate in these.rates
        }
        some = [runs[f"{comparison}_{arm}_lr_{chosen}_{seed}"]["test"]["val_accuracy"] for seed in these.seeds]
        told[arm] = {
            "validation_accuracy_of_rate": tried, "test_accuracies": some, "mean": statistics.mean(some),
            "stdev": statistics.stdev(some),
        }  # fmt: skip
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", default="models/all-MiniLM-L6-v2", help="the folder or hub name of the pre-trained encoder")
    parser.add_argument("--work", type=Path, default=Path("task_runs"), help="where runs and token stores go")
    parser.add_argument("--only", default="", help="names or patterns such as encoder_*, with commas between them; all")
    parser.add_argument("--set", nargs="*", default=[], help="further key=value for every training")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    work = args.work.resolve()
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"what": "tasks", "runs": {}}
    record |= {
        "versions": {"distllm": distllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
    }
    work.mkdir(parents=True, exist_ok=True)
    sentences = (args.data / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / f"sst2_{FEW}.tsv").write_text("".join(sentences[:FEW]), encoding="utf-8")
    every = plans(args.data.resolve(), work, args.encoder)
    for name, (training, measuring) in every.items():
        if args.only and not any(fnmatch(name, pattern) for pattern in args.only.split(",")):
            continue
        folder = work / "runs" / name
        words = [*training, f"out={work}/runs", f"data.store={work}/store", *args.set]
        run(["train", *words])
        summary = json.loads((folder / "summary.json").read_text())
        entry: dict[str, Any] = {"date": date.today().isoformat(), "summary": summary, "set": args.set}
        entry["train"] = shown(["train", *words], args.data.resolve(), work)
        if measuring:
            run(["eval", str(folder), *measuring, "--json", str(folder / "test.json")])
            entry["test"] = json.loads((folder / "test.json").read_text())
            entry["test"].pop("source", None)
            if name == "sst2_minilm":
                shutil.copy(folder / "report" / "confusion-test.png", args.out.with_name("confusion_sst2_minilm.png"))
            entry["eval"] = shown(["eval", str(folder), *measuring], args.data.resolve(), work)
        if name.endswith("encoder_pretrain"):
            entry["most_frequent"] = most_frequent(folder)
        record["runs"][name] = entry
        if all(f"student_{seed}{ending}" in record["runs"] for seed in SEEDS for ending in ("", "_alone")):
            record["students"] = students(record["runs"])
        for comparison in COMPARISONS:
            arms = [run for run in every if run.startswith((f"{comparison}_finetune", f"{comparison}_scratch"))]
            if all(run in record["runs"] for run in arms):
                record["encoders"] = record.get("encoders", {}) | {comparison: encoders(record["runs"], comparison)}
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def shown(words: Sequence[str], data: Path, work: Path) -> str:
    """A command without the places of one machine."""
    line = "distllm " + " ".join(words)
    for place, name in ((str(data), "data"), (str(work), "WORK"), (str(ROOT) + "/", "")):
        line = line.replace(place, name)
    return line


if __name__ == "__main__":
    main()
