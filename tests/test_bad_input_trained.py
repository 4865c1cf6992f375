"""What cannot be done with models that were trained: one clear line each, through the command line, before any step."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distllm.cli import run
from distllm.comm import World
from distllm.config.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA
from distllm.config.load import to_yaml
from distllm.config.schema import Config
from distllm.train.inference import export_source
from tests.runs import run_tiny
from tests.train.tasks import task_config

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FILES = {
    "unknown.tsv": "a good film\tgood\na fine film\tfine\n", "long.tsv": "good film " * 40 + "\tgood\n",
    "misnamed.jsonl": '{"txt": "good", "label": "good"}\n', "three.txt": "a\nb\nc\n", "two.txt": "a\nb\n", "gap.txt": "a\n\nc\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a classifier, of one with another tokenizer, of a translator, and of two classifiers of pairs, one without token types."""
    folder = tmp_path_factory.mktemp("trained")
    plain = {"type": None, "sizes": {}, "dropout": None, "spec": "distllm.models.word_vector:spec"}
    made = {
        "classifier": task_config("classification", folder), "pairs": task_config("pairs", folder),
        "plain_pairs": task_config("pairs", folder, model=plain),
        "other": task_config("classification", folder, data={"tokenizer": {"kind": "chars"}}),
        "translator": task_config("t5", folder),
    }  # fmt: skip
    for name, config in made.items():
        config = config.model_copy(update={"name": name, "train": config.train.model_copy(update={"steps": 2})})
        (folder / f"{name}.yaml").write_text(to_yaml(config), encoding="utf-8")
        assert run_tiny(ALONE, Config.model_validate(config.model_dump(mode="json"))) == 0
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


FROM = ["model.type=null", "model.sizes={}", "model.path=runs/classifier"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("eval runs/classifier --data unknown.tsv", EXIT_DATA, "unknown.tsv, line 2: the label 'fine' in column 'label' is none that training knows (bad, good); mend it, or drop the row"),
        ("eval runs/classifier --data misnamed.jsonl", EXIT_DATA, "misnamed.jsonl, line 1: no column 'text'; the columns are txt, label; set the source's `column`, nearest: txt"),
        ("predict runs/classifier --input misnamed.jsonl --output o.tsv", EXIT_DATA, "misnamed.jsonl, line 1: no column 'text'; the columns are txt, label; set the source's `column`, nearest: txt"),
        ("eval runs/classifier --data long.tsv", EXIT_DATA, "data.seq_len=160: 1 of 1 examples of long.tsv are longer and --truncate=refuse; the longest is example 0, whose input takes 402 tokens with its special tokens; nearest: data.seq_len=402, or --truncate=head, tail, middle or window"),
        ("eval runs/translator --data three.txt --target two.txt", EXIT_DATA, "three.txt has 3 lines, but two.txt has 2; line n belongs to line n"),
        ("eval runs/translator --data three.txt --target gap.txt", EXIT_DATA, "gap.txt, line 2: the line is empty; drop it from both files"),
        ("eval runs/classifier --ensemble runs/other", EXIT_DATA, "--ensemble=runs/other, step 2: has another tokenizer than runs/classifier, step 2, so its ids mean other text"),
        ("eval runs/classifier --ensemble runs/translator", EXIT_CONFIG, "--ensemble=runs/translator, step 2: was trained for seq2seq, and runs/classifier, step 2 for classification"),
        ("train classifier.yaml name=new distill.teacher=runs/other", EXIT_CONFIG, "distill.teacher=runs/other: has another tokenizer, whose ids mean other text; train with data.tokenizer of the teacher"),
        ("train classifier.yaml name=new distill.teacher=runs/translator", EXIT_DATA, "distill.teacher=runs/translator: is an encoder-decoder, which is for task.kind=seq2seq; for task.kind=classification use an encoder such as bert"),
        ("train classifier.yaml name=new distill.teacher=./ruhns/classifier", EXIT_DATA, "distill.teacher=./ruhns/classifier: no such folder; nearest: runs/classifier"),
        ("train classifier.yaml name=new resume=runs/clasifier", EXIT_CHECKPOINT, "resume=runs/clasifier: no such run or checkpoint; nearest: runs/classifier"),
        ("train classifier.yaml name=new model.type=null model.sizes={} model.path=./runs/clasifier", EXIT_DATA, "model.path=./runs/clasifier: no such folder; nearest: runs/classifier"),
        (" ".join(["train classifier.yaml name=new", *FROM, "task.labels=[good,bad]"]), EXIT_CONFIG, "task.labels=[good, bad]: the head of model.path=runs/classifier has them as bad, good; nearest: task.labels=[bad, good]"),
        (" ".join(["train classifier.yaml name=new", *FROM, "data.seq_len=512"]), EXIT_CONFIG, "data.seq_len=512: the model has 160 positions; use data.seq_len=160"),
    ],
)  # fmt: skip
def test_it_is_one_clear_line(words: str, code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([word.replace(",bad", ", bad") for word in words.split()]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distllm: ")]
    assert lines == [f"distllm: {told}"]
    assert not list(Path("runs/new").glob("checkpoints/step-*"))


def test_a_start_that_failed_leaves_no_teacher_behind(folder: Path) -> None:
    assert run(["train", "classifier.yaml", "name=taught", "distill.teacher=runs/other"]) == EXIT_CONFIG
    assert run(["train", "classifier.yaml", "name=taught", "distill.teacher=runs/classifier"]) == 0
    kept = load_file(folder / "runs/taught/teacher/model.safetensors")
    wanted = load_file(export_source("runs/classifier", folder / "exported") / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(("labels", "told"), [("[bad, good]", False), ("[neg, pos]", True)])
def test_a_head_that_learns_other_labels_is_told(labels: str, told: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = folder / "tables" / "labelled.tsv"
    if told:
        table = folder / "renamed.tsv"
        renamed = (folder / "tables" / "labelled.tsv").read_text().replace("\tgood\n", "\tpos\n").replace("\tbad\n", "\tneg\n")
        table.write_text(renamed, encoding="utf-8")
    name = f"head_{told}".lower()
    assert run(["train", "classifier.yaml", f"name={name}", *FROM, f"task.labels={labels}", f"data.sources.0.path={table}"]) == 0
    assert ("the head that was taken answered bad, good, and learns other labels now" in capsys.readouterr().err) == told


def test_models_with_and_without_token_types_answer_together() -> None:
    losses = []
    for first, second in (("pairs", "plain_pairs"), ("plain_pairs", "pairs")):
        assert run(["eval", f"runs/{first}", "--ensemble", f"runs/{second}", "--json", f"{first}.json"]) == 0
        losses.append(json.loads(Path(f"{first}.json").read_text())["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
