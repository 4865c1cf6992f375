"""Evaluating, generating from and exporting what was trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from distllm.comm import World
from distllm.config.errors import CheckpointError, ConfigError, DataError
from distllm.train.inference import evaluate_source, export_source, generate_source
from tests.ranks import on_ranks
from tests.runs import metrics, run_tiny, tiny_config, words

ONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two sharded ranks: its checkpoints are in two files."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(folder, "layout.dp_shard=2", "train.steps=40", "checkpoint.every=20")
    assert on_ranks(lambda world: run_tiny(world, config), 2, folder / "ranks") == [0, 0]
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_source(str(trained), tmp_path_factory.mktemp("exported") / "model")


def test_a_run_evaluates_on_its_own_validation_data_as_it_did_in_training(trained: Path) -> None:
    logged = [line for line in metrics(trained) if "val_loss" in line][-1]
    found = evaluate_source(str(trained), texts=[])
    assert found["val_tokens"] == logged["val_tokens"]
    assert found["val_loss"] == pytest.approx(logged["val_loss"], rel=1e-6)


def test_run_checkpoint_and_export_agree_on_a_text(trained: Path, exported: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(words(300, seed=99), encoding="utf-8")
    found = [evaluate_source(str(s), texts=[text]) for s in (trained, trained / "checkpoints" / "step-40", exported)]
    assert found[0]["val_loss"] < math.log(256) and found[0]["val_tokens"] == len(text.read_bytes()) - 1
    for other in found[1:]:
        assert other["val_loss"] == pytest.approx(found[0]["val_loss"], rel=1e-6)
    assert found[0]["bits_per_byte"] == pytest.approx(found[0]["val_loss"] / math.log(2), rel=1e-2)
    assert evaluate_source(str(trained / "checkpoints" / "step-20"), texts=[text])["val_loss"] > found[0]["val_loss"]


def test_run_and_export_write_the_same_text(trained: Path, exported: Path) -> None:
    texts = ["".join(generate_source(str(s), prompts=["ab "], max_tokens=20, seed=5)) for s in (trained, exported)]
    assert texts[0] == texts[1] and len(texts[0]) > 5
    assert "".join(generate_source(str(trained), prompts=["ab "], max_tokens=20, seed=6)) != texts[0]
    batch = list(generate_source(str(trained), prompts=["ab ", "longer prompt"], max_tokens=5, temperature=0.0))
    alone = ["".join(generate_source(str(trained), prompts=[p], max_tokens=5, temperature=0.0)) for p in ("ab ", "longer prompt")]
    assert batch == alone


def test_plain_transformers_loads_the_export_with_equal_logits(trained: Path, exported: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distllm.train.inference import open_source

    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = torch.tensor([tokenizer("a few words")["input_ids"]])
    ours = open_source(str(trained)).model
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(input_ids=ids).logits)


def test_what_cannot_be_used_is_told_in_one_line(trained: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no validation data of its own; give a text file, --text FILE"):
        evaluate_source(str(exported), texts=[])
    with pytest.raises(DataError, match="neither a run or checkpoint of distllm nor a model folder"):
        next(generate_source(str(tmp_path), prompts=["a"]))
    broken = tmp_path / "latin.txt"
    broken.write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(DataError, match=r"latin\.txt:2: not UTF-8 text"):
        evaluate_source(str(trained), texts=[broken])
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        export_source(str(tmp_path), tmp_path / "out")
