"""Examples and task settings that cannot be used: one clear line each, before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from distllm.cli import run
from distllm.config.errors import EXIT_CONFIG, EXIT_DATA

LABELLED = """
name: small
task: {kind: classification}
model: {spec: "distllm.models.word_vector:spec"}
data:
  sources: [{kind: tsv, path: t.tsv, names: [text, label]}]
  tokenizer: {kind: bytes}
  validation: {fraction: 0.2}
train: {steps: 2, sample_tokens: 0}
schedule: {warmup: 1}
"""
PARALLEL = """
name: small
task: {kind: seq2seq}
model: {spec: "distllm.models.gru_seq2seq:spec"}
data:
  sources: [{kind: parallel, path: s.txt, target_path: u.txt}]
  tokenizer: {kind: bytes}
train: {steps: 2}
schedule: {warmup: 1}
"""
OTHER = "data.validation.sources=[{kind: tsv, path: v.tsv, names: [text, label]}]"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with tables and texts."""
    files = {
        "t.tsv": "good film\tpos\nbad film\tneg\n" * 20, "v.tsv": "fine\tmeh\n",
        "s.txt": "a\nb\n", "u.txt": "a\n", "e.txt": "a\n\n",
        "labelled.yaml": LABELLED, "parallel.yaml": PARALLEL,
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["labelled.yaml", OTHER], EXIT_DATA, "v.tsv, line 1: the label 'meh' in column 'label' is none that"),
        (["labelled.yaml", "data.sources.0.names=[txt, label]"], EXIT_DATA, "no column 'text'; the columns are txt, label"),
        (["labelled.yaml", "task.labels=[a, b]"], EXIT_DATA, "'pos' in column 'label' is none of the `labels` of the task"),
        (["labelled.yaml", "data.seq_len=4"], EXIT_DATA, "34 of 34 examples of data.sources.0 are longer"),
        (["labelled.yaml", "train.best_metric=val_bleu"], EXIT_CONFIG, "val_bleu: classification measures val_loss"),
        (["labelled.yaml", "data.sources.0.weight=0"], EXIT_CONFIG, "data.sources.0.weight=0: must be a number above 0"),
        (["labelled.yaml", "tune.train=head"], EXIT_CONFIG, "tune.train=head: the rest of the model would stay random"),
        (["labelled.yaml", "train.batch_tokens=64", "train.global_batch=8"], EXIT_CONFIG, "not with train.global_batch too"),
        (["labelled.yaml", "data.sources.0.kind=text", "data.sources.0.names=[]"], EXIT_CONFIG, "needs examples with columns"),
        (["labelled.yaml", "task.kind=multi_task"], EXIT_CONFIG, "multi_task needs at least one task"),
        (["labelled.yaml", "distill.alpha=0.3"], EXIT_CONFIG, "the other keys of distill need a teacher"),
        (["parallel.yaml"], EXIT_DATA, "s.txt has 2 lines, but u.txt has 1"),
        (["parallel.yaml", "data.sources.0.target_path=e.txt"], EXIT_DATA, "e.txt, line 2: the line is empty"),
        (["parallel.yaml", "task.metrics=[rouge]"], EXIT_CONFIG, "rouge is not one of bleu, chrf"),
    ],
)  # fmt: skip
def test_it_is_one_clear_line(words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *words]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distllm: ")]
    assert any(told in line for line in lines), lines
    assert not Path("runs/small/checkpoints").exists() or not list(Path("runs/small/checkpoints").glob("step-*"))
