"""A small config of every task, with examples that a model can learn from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from distllm.config.load import from_yaml, to_yaml
from distllm.config.schema import Config
from distllm.data.prepare import prepare
from tests.runs import TINY, words

BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8}
CLASSIC = "distllm.models."


def sentences(count: int, *, seed: int = 3) -> list[tuple[str, str, str]]:
    """(text, its label, its target): which word comes most often is the label, the words backwards the target."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        liked = rng.choice(["good", "bad"])
        text = [rng.choice(["good", "bad", "film", "plot", "the", "a", liked, liked]) for _ in range(rng.randint(3, 12))]
        made.append((" ".join(text), liked, " ".join(reversed(text))))
    return made


def write_tables(folder: Path) -> dict[str, Path]:
    """Files with the examples of every kind of task."""
    folder.mkdir(parents=True, exist_ok=True)
    made = sentences(96)
    scores = {"good": 1.0, "bad": -1.0}
    tables = {
        "labelled.tsv": [f"{t}\t{label}" for t, label, _ in made],
        "pairs.jsonl": [json.dumps({"text": t, "second": s, "label": label}) for t, label, s in made],
        "numbers.jsonl": [json.dumps({"text": t, "label": scores[label] + 0.1 * len(t) / 50}) for t, label, _ in made],
        "source.txt": [t for t, _, _ in made],
        "target.txt": [s for _, _, s in made],
        "chats.jsonl": [
            json.dumps({"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": label}]})
            for t, label, _ in made
        ],
        "text.txt": words(3000).split("\n\n"),
    }
    paths = {}
    for name, lines in tables.items():
        paths[name] = folder / name
        paths[name].write_text(("\n\n" if name == "text.txt" else "\n").join(lines) + "\n", encoding="utf-8")
    return paths


def task_section(name: str, files: dict[str, Path]) -> dict[str, Any]:
    """What a config of this task has besides the rest of `task_config`."""
    labelled = {"kind": "tsv", "path": str(files["labelled.tsv"]), "names": ["text", "label"]}
    parallel = {"kind": "parallel", "path": str(files["source.txt"]), "target_path": str(files["target.txt"])}
    numbers = {"kind": "jsonl", "path": str(files["numbers.jsonl"])}
    bert, llama = {"type": "bert", "sizes": BERT}, {"type": "llama", "sizes": TINY}
    plain = {"kind": "text", "path": str(files["text.txt"]), "document": "paragraph"}
    return {
        "causal_lm": {"task": {"kind": "causal_lm"}, "model": llama, "source": plain},
        "masked_lm": {"task": {"kind": "masked_lm"}, "model": bert, "source": plain},
        "translation_lm": {"task": {"kind": "translation_lm"}, "model": bert, "source": parallel},
        "classification": {"task": {"kind": "classification"}, "model": bert, "source": labelled},
        "pairs": {
            "task": {"kind": "classification", "label_smoothing": 0.1}, "model": bert,
            "source": {"kind": "jsonl", "path": str(files["pairs.jsonl"]), "pair_column": "second"},
        },
        "decoder_classification": {"task": {"kind": "classification"}, "model": llama, "source": labelled},
        "word_vector": {"task": {"kind": "classification"}, "model": {"spec": f"{CLASSIC}word_vector:spec"}, "source": labelled},
        "lstm": {"task": {"kind": "classification"}, "model": {"spec": f"{CLASSIC}lstm:spec"}, "source": labelled},
        "bag_of_words": {
            "task": {"kind": "classification"}, "model": {"spec": f"{CLASSIC}bag_of_words:spec"}, "source": labelled,
        },
        "regression": {"task": {"kind": "regression"}, "model": {"type": "roberta", "sizes": BERT}, "source": numbers},
        "marian": {
            "task": {"kind": "seq2seq", "label_smoothing": 0.1}, "model": {"type": "marian", "sizes": BART}, "source": parallel,
        },
        "t5": {"task": {"kind": "seq2seq"}, "model": {"type": "t5", "sizes": T5}, "source": parallel},
        "gru": {"task": {"kind": "seq2seq"}, "model": {"spec": f"{CLASSIC}gru_seq2seq:spec"}, "source": parallel},
        "sft": {
            "task": {"kind": "sft"}, "model": llama,
            "source": {"kind": "jsonl", "path": str(files["chats.jsonl"]), "messages_column": "messages"},
        },
        "multi_task": {
            "task": {
                "kind": "multi_task",
                "tasks": {"mood": {"kind": "classification"}, "score": {"kind": "regression", "weight": 0.5}},
            },
            "model": bert, "sources": [{**labelled, "task": "mood", "weight": 2.0}, {**numbers, "task": "score"}],
        },
    }[name]  # fmt: skip


TASKS = (
    "causal_lm", "masked_lm", "translation_lm", "classification", "pairs", "decoder_classification", "word_vector", "lstm",
    "bag_of_words", "regression", "marian", "t5", "gru", "sft", "multi_task",
)  # fmt: skip
KINDS = ("causal_lm", "masked_lm", "translation_lm", "classification", "regression", "marian", "sft", "multi_task")
"""One task of each kind."""


def task_config(name: str, folder: Path, *, dropout: float = 0.0, **changes: dict[str, Any]) -> Config:
    """A config of the task whose data lie, prepared, in `folder`.

    Args:
        name: one of TASKS.
        folder: of the test.
        dropout: layouts draw different masks, so they can be compared without it only.
        changes: keys of sections, in place of the usual ones.
    """
    section = task_section(name, write_tables(folder / "tables"))
    model = section["model"]
    section["model"] = {**model, "spec_args": {"dropout": dropout}} if "spec" in model else {**model, "dropout": dropout}
    sources = section.pop("sources", None) or [section.pop("source")]
    base: dict[str, Any] = {
        "name": "small", "out": str(folder / "runs"),
        "data": {
            "sources": sources, "tokenizer": {"kind": "bytes"}, "seq_len": 160, "store": str(folder / "store"), "workers": 1,
            "validation": {"fraction": 0.2},
        },
        "train": {
            "steps": 4, "global_batch": 8, "micro_batch": 2, "log_every": 1, "eval_every": 2, "sample_tokens": 0, "threads": 1,
        },
        "optim": {"lr": 0.01}, "schedule": {"warmup": 1}, "checkpoint": {"every": 2},
    } | section  # fmt: skip
    for key, values in changes.items():
        base[key] = {**base.get(key, {}), **values} if isinstance(values, dict) else values
    config = from_yaml(to_yaml(Config.model_validate(base)))
    prepare(config)  # here and not in a rank: the children of the tests may have no children
    return config
