"""Small whole runs for tests: a config, its text, and what a run left behind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from distllm.checkpoint.find import find, read_full
from distllm.comm import World
from distllm.config.load import from_yaml, load, to_yaml
from distllm.config.schema import Config
from distllm.data.prepare import prepare
from distllm.train.build import build
from distllm.train.loop import train

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def words(count: int, *, seed: int = 7) -> str:
    """Text with some order in it, so that a model can learn: each word says which come next."""
    rng = random.Random(seed)
    names = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 5))) for _ in range(40)]
    after = {name: rng.sample(names, 3) for name in names}
    text, word = [], names[0]
    for i in range(count):
        text.append(word + ("\n\n" if i % 60 == 59 else " "))
        word = rng.choice(after[word])
    return "".join(text)


def tiny_config(folder: Path, *overrides: str, prepared: bool = True) -> Config:
    """A config of a byte-level Llama of 20 thousand parameters; its text and its token store lie in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        text.write_text(words(4000), encoding="utf-8")
    file = folder / "tiny.yaml"
    base = Config.model_validate(
        {
            "name": "tiny", "out": str(folder / "runs"), "model": {"type": "llama", "sizes": TINY},
            "data": {
                "sources": [{"kind": "text", "path": str(text), "document": "paragraph"}],
                "tokenizer": {"kind": "bytes"}, "seq_len": 32, "store": str(folder / "store"), "workers": 1,
                "validation": {"fraction": 0.1},
            },
            "train": {
                "steps": 12, "global_batch": 8, "micro_batch": 2, "log_every": 1, "eval_every": 4, "eval_batches": 2,
                "sample_every": 4,
                "sample_tokens": 4, "threads": 1,
            },
            "optim": {"lr": 0.01}, "schedule": {"warmup": 2}, "checkpoint": {"every": 4},
        }
    )  # fmt: skip
    file.write_text(to_yaml(base), encoding="utf-8")
    config = load(file, overrides).config
    if prepared:
        prepare(config)  # here and not in a rank: the children of the tests may have no children
    return config


def run_tiny(world: World, config: Config) -> int:
    """Build and train; returns the exit code."""
    return train(build(config, world))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Step -> training loss."""
    return {line["step"]: line["loss"] for line in metrics(folder) if "loss" in line}


def state(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a run's newest checkpoint, whole."""
    import logging

    found = find(folder, logger=logging.getLogger("tests"))
    return {name: tensor.numpy().copy() for name, tensor in read_full(found, names_prefix="")}


__all__ = ["TINY", "from_yaml", "losses", "metrics", "run_tiny", "state", "tiny_config", "words"]
