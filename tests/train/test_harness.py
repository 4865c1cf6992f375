"""lm-evaluation-harness on a model folder: what is told where it is missing, and a task of our own where it is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers

from distllm.config.errors import ConfigError
from distllm.train.harness import figures_of, run_harness
from tests.train.test_predict import folder_of

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
    with pytest.raises(ConfigError, match=r"the package lm_eval is not installed .*; pip install lm_eval"):
        run_harness(tmp_path, ["arc_easy"], kind="causal_lm")
    with pytest.raises(ConfigError, match=r"is for models that write text, and .* is for classification"):
        run_harness(tmp_path, ["arc_easy"], kind="classification")


def test_the_figures_of_its_results() -> None:
    results = {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25}}
    assert figures_of(results) == {"arc.acc": 0.5, "arc.acc_norm": 0.25}


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": "The sky is", "choices": ["blue", "loud"], "answer": i} for i in (0, 1)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    folder = folder_of(tmp_path / "m", transformers.AutoModelForCausalLM, "gpt2", **sizes)
    found = run_harness(Path(folder), [str(tmp_path / "colours.yaml")], kind="causal_lm")
    assert found["colours.acc"] == 0.5  # the same question, with each answer once
    with pytest.raises(ConfigError, match="lm_eval has no such task"):
        run_harness(Path(folder), ["nosuchtask"], kind="causal_lm")
