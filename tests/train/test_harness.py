"""lm-evaluation-harness: a task of one's own on folders and runs against transformers, and what is told where it is missing."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from distllm import cli
from distllm.comm import World
from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import TokenizerConfig
from distllm.data.tokenizer import make_tokenizer
from distllm.train.harness import figures_of, run_harness
from distllm.train.inference import Choice, export_source, exported
from tests.runs import run_tiny, tiny_config
from tests.train.test_predict import folder_of

QUESTIONS = ("The sky is", "A drum is", "My coat was", "They were", "so", "a fine day and")
T5 = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 8, "decoder_start_token_id": 0}
TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: DATA
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_what_is_told_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"the package lm_eval is not installed .*; pip install 'distllm\[harness\]'"):
        run_harness(tmp_path, ["arc_easy"], kind="causal_lm")
    with pytest.raises(ConfigError, match=r"is for models that write text, and this one is for classification"):
        run_harness(tmp_path, ["arc_easy"], kind="classification")


def test_the_figures_of_its_results() -> None:
    results = {"arc": {"alias": "arc", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25}}
    assert figures_of(results) == {"arc.acc": 0.5, "arc.acc_norm": 0.25}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task file: which of two words comes next. Whoever asks the network for something fails."""

    def refused(connection: socket.socket, address: object) -> None:
        raise ConnectionError(f"a test asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": text, "choices": ["blue", "loud"], "answer": i % 2} for i, text in enumerate(QUESTIONS)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_tokenizer(TokenizerConfig(kind="bytes"), iter(QUESTIONS), tmp_path / "m" / "tokenizer")
    (tmp_path / "colours.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    return tmp_path / "colours.yaml"


def by_hand(folder: str, auto: Any) -> float:
    """The share of the questions whose right answer is the likelier one, as the harness counts it: sums of log probabilities."""
    model, tokenizer = auto.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    right = []
    for number, question in enumerate(QUESTIONS):
        start, sums = tokenizer(question, add_special_tokens=False).input_ids, []
        for choice in ("blue", "loud"):
            answer = tokenizer(" " + choice, add_special_tokens=False).input_ids
            if model.config.is_encoder_decoder:
                logits = model(torch.tensor([start]), labels=torch.tensor([answer])).logits[0]
            else:
                logits = model(torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
            sums.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item())
        right.append(sums.index(max(sums)) == number % 2)
    return sum(right) / len(right)


def test_a_task_of_ones_own_through_the_command_line(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    folder = folder_of(tasks.parent / "m", transformers.AutoModelForCausalLM, "gpt2", **sizes)
    figures = tasks.parent / "figures.json"
    assert cli.run(["eval", folder, "--harness", str(tasks), "--device", "cpu", "--json", str(figures)]) == 0
    expected = by_hand(folder, transformers.AutoModelForCausalLM)
    assert json.loads(figures.read_text())["colours.acc"] == expected and 0 < expected < 1
    assert "colours.acc" in capsys.readouterr().out
    (Path(folder) / "distllm.json").write_text('{"clean": {"lowercase": true}}')
    assert cli.run(["eval", folder, "--harness", f"{tasks},nosuchtask", "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "--harness=nosuchtask: lm_eval has no such task" in told and "--harness: its texts are not cleaned as those" in told


def test_a_run_and_an_encoder_decoder(tasks: Path) -> None:
    config = tiny_config(tasks.parent / "run", "train.steps=1", "train.sample_tokens=0")
    run_tiny(World(0, 1, 0, 1, torch.device("cpu")), config)
    run = str(tasks.parent / "run" / "runs" / "tiny")
    export_source(run, tasks.parent / "exported")
    with exported(run, choice=Choice(), trust=False) as (folder, kind):
        found = run_harness(folder, [str(tasks)], kind=kind)
    assert found["colours.acc"] == by_hand(str(tasks.parent / "exported"), transformers.AutoModelForCausalLM)
    folder = folder_of(tasks.parent / "t5", transformers.AutoModelForSeq2SeqLM, "t5", **T5)
    found = run_harness(Path(folder), [str(tasks)], kind="seq2seq")
    assert found["colours.acc"] == by_hand(folder, transformers.AutoModelForSeq2SeqLM)


def test_an_encoder_decoder_with_beams_of_its_own_writes_greedily(tasks: Path) -> None:
    """Of each question the harness watches one row for its stop words."""
    auto = transformers.AutoModelForSeq2SeqLM
    folder = folder_of(tasks.parent / "t5", auto, "t5", **T5 | {"initializer_factor": 3.0})
    model, tokenizer = auto.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for question in QUESTIONS:
        inputs = tokenizer(question, return_tensors="pt")
        length = inputs["input_ids"].shape[1] + 6  # which is what the harness means by max_gen_toks
        ids = model.generate(**inputs, max_length=length, num_beams=1, do_sample=False)
        rows.append({"question": question, "answer": tokenizer.decode(ids[0], skip_special_tokens=True)})
    (tasks.parent / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASK.replace("DATA", str(tasks.parent / "data.jsonl")).replace("multiple_choice", "generate_until")
    task = task.replace('doc_to_choice: "{{choices}}"\n', "").replace("doc_to_target: answer", 'doc_to_target: "{{answer}}"')
    tasks.write_text(task.replace("acc", "exact_match") + "generation_kwargs:\n  until: ['@@']\n  max_gen_toks: 6\n")
    transformers.GenerationConfig(num_beams=4, length_penalty=0.5, decoder_start_token_id=0).save_pretrained(folder)
    assert run_harness(Path(folder), [str(tasks)], kind="seq2seq", batch=1)["colours.exact_match"] == 1.0


def test_data_that_cannot_be_had_are_told(tasks: Path) -> None:
    (tasks.parent / "data.jsonl").unlink()
    folder = folder_of(tasks.parent / "m", transformers.AutoModelForCausalLM, "gpt2", n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(DataError, match="--harness=colours: "):
        run_harness(Path(folder), [str(tasks)], kind="causal_lm")
