"""Every YAML in configs/ loads, says in its first line what it is, and trains two steps of a shrunken copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distllm.comm import World
from distllm.config.check import check
from distllm.config.load import load
from distllm.config.schema import Config
from distllm.train.build import build
from distllm.train.loop import train
from tests.runs import losses, words
from tests.train.tasks import write_tables

FOLDER = Path(__file__).resolve().parent.parent / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
SHRUNKEN_SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "n_layer": 1, "n_embd": 32, "n_head": 2, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip


def shrink(config: Config, folder: Path) -> Config:
    """The same config with a small model on a small text for two steps."""
    text = folder / "text.txt"
    text.write_text(words(4000), encoding="utf-8")
    data = config.model_dump(mode="json")
    data |= {"name": "small", "out": str(folder / "runs"), "device": "cpu"}
    sizes = data["model"]["sizes"]
    data["model"]["sizes"] = {k: min(v, SHRUNKEN_SIZES[k]) if k in SHRUNKEN_SIZES else v for k, v in sizes.items()}
    data["data"]["sources"] = [source_for(config, text, folder)]
    examples = config.task.kind in ("classification", "seq2seq")
    data["data"]["validation"] = {"fraction": 0.2}
    data["data"] |= {"store": str(folder / "store"), "workers": 1, "seq_len": min(64 if examples else 32, config.data.seq_len)}
    data["data"]["tokenizer"] = {"kind": "bpe", "vocab_size": 300}
    data["distill"] = {}
    if config.model.path is not None:  # what it starts from is not here
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        data["model"] = {"type": "bert", "sizes": sizes}
        data["tune"] = {}
    data["train"] |= {"steps": 2, "log_every": 1, "eval_batches": 1, "sample_tokens": 4, "micro_batch": 2}
    data["train"] |= {"batch_tokens": 512} if config.train.batch_tokens else {"global_batch": 2}
    data["schedule"]["warmup"] = 1
    data["track"]["wandb"] = False
    return Config.model_validate(data)


def source_for(config: Config, text: Path, folder: Path) -> dict[str, Any]:
    """A small source of the kind that the task takes."""
    if config.task.kind in ("causal_lm", "masked_lm"):
        return {"kind": "text", "path": str(text), "document": "paragraph"}
    files = write_tables(folder / "tables")
    if config.task.kind == "seq2seq":
        return {"kind": "parallel", "path": str(files["source.txt"]), "target_path": str(files["target.txt"])}
    return {"kind": "tsv", "path": str(files["labelled.tsv"]), "names": ["text", "label"]}


def test_there_are_configs() -> None:
    assert {"quickstart.yaml", "shakespeare_char.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_values_go_together(path: Path) -> None:
    assert check(load(path).config, world_size=1) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_trains_two_steps(path: Path, tmp_path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) > 40
    config = load(path).config
    assert train(build(shrink(config, tmp_path), World(0, 1, 0, 1, torch.device("cpu")))) == 0
    assert set(losses(tmp_path / "runs" / "small")) == {1, 2}
