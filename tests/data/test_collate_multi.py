from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from distllm.data.batch import IGNORE
from distllm.data.examples import ExampleSamples
from distllm.data.masking import MaskVocabulary
from tests.data.examples import Given, config_of, samples_of, store_of, texts

VOCABULARY = MaskVocabulary(4, np.arange(5000) < 5, np.ones(5000, dtype=bool), np.zeros(5000, dtype=bool))
TASKS = {"sense": {"kind": "classification"}, "stars": {"kind": "regression"}, "words": {"kind": "masked_lm"}}


def samples(folder: Path) -> ExampleSamples:
    stores = (
        store_of(folder, "a", text=texts(40), labels=[i % 3 for i in range(40)], task="sense"),
        store_of(folder, "b", text=texts(40, first=100), pair=texts(40), labels=[i / 4 for i in range(40)], task="stars"),
        store_of(folder, "c", text=texts(40, first=200, longest=30), task="words"),
    )
    sources = [{"task": name, "weight": weight} for name, weight in (("sense", 2.0), ("stars", 1.0), ("words", 1.0))]
    config = config_of({"kind": "multi_task", "tasks": TASKS, "mask_probability": 0.5}, sources=sources, seq_len=48)
    return samples_of(Given(stores), config, vocabulary=VOCABULARY)


def test_each_row_has_the_answer_of_its_task(tmp_path: Path) -> None:
    (batch,) = samples(tmp_path).train_batches([[*range(64), -1]])
    rows, targets = {name: batch.inputs[f"rows_{name}"] for name in TASKS}, batch.targets
    assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(64)), "each row has one task, and padding none"
    first = batch.inputs["input_ids"][:, 1]
    assert targets["labels_sense"].tolist() == [(n - 10) % 3 for n in first[rows["sense"]].tolist()]
    assert targets["labels_stars"].tolist() == [(n - 100) / 4 for n in first[rows["stars"]].tolist()]
    assert targets["labels_sense"].dtype == torch.int64 and targets["labels_stars"].dtype == torch.float32
    assert targets["weight_stars"].tolist() == [1.0] * len(rows["stars"])
    hidden = targets["labels_words"] != IGNORE
    assert hidden.shape == (len(rows["words"]), batch.inputs["input_ids"].shape[1]) and hidden.any(dim=1).float().mean() > 0.5
    whole = torch.where(hidden, targets["labels_words"], batch.inputs["input_ids"][rows["words"]])
    assert (whole[:, 1] >= 200).all() and not (whole == 4).any()
    others = torch.cat([rows["sense"], rows["stars"]])
    assert not (batch.inputs["input_ids"][others] == 4).any(), "only rows of its own task are hidden"


def test_tasks_are_drawn_by_weight(tmp_path: Path) -> None:
    made = samples(tmp_path)
    source, _ = made.order.locate(np.arange(made.order.block))
    assert np.bincount(source).tolist() == [512, 256, 256]


def test_a_batch_may_lack_a_task(tmp_path: Path) -> None:
    made = samples(tmp_path)
    source, _ = made.order.locate(np.arange(64))
    (batch,) = made.train_batches([np.flatnonzero(source == 0).tolist()])
    for name in ("stars", "words"):
        assert batch.inputs[f"rows_{name}"].shape == (0,) and len(batch.targets[f"labels_{name}"]) == 0
