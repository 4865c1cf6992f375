from __future__ import annotations

from pathlib import Path

import numpy as np

from distllm.config.schema import TaskConfig
from distllm.data.batch import IGNORE
from distllm.data.collate_masked import collate_masked
from distllm.data.masking import MaskVocabulary
from distllm.data.order import keys_of
from distllm.data.ragged import Frame, empty, ragged
from tests.data.examples import Given, config_of, samples_of, store_of, texts

VOCABULARY = MaskVocabulary(4, np.arange(5000) < 5, np.ones(5000, dtype=bool), np.zeros(5000, dtype=bool))


def given(folder: Path) -> Given:
    return Given((store_of(folder, text=texts(60, longest=10), target=texts(60, seed=3, longest=10, first=300)),))


def config(masking: str = "dynamic") -> dict[str, object]:
    return {"kind": "translation_lm", "mask_probability": 0.5, "masking": masking}


def test_pairs_are_joined_and_hidden_on_both_sides(tmp_path: Path) -> None:
    samples = samples_of(given(tmp_path), config_of(config()), vocabulary=VOCABULARY)
    (batch,) = samples.train_batches([[*range(samples.train_size), -1]])
    rows, labels = batch.inputs["input_ids"].numpy(), batch.targets["labels"].numpy()
    whole = np.where(labels == IGNORE, rows, labels)
    for row in whole[:-1].tolist():
        end = row.index(3)
        assert row[0] == 2 and row[end + 1] - 300 == row[1] - 10 and row.index(3, end + 1)
    chosen, seen = labels != IGNORE, batch.inputs["attention_mask"].numpy() == 1
    assert not chosen[~seen].any() and not chosen[whole < 5].any() and not chosen[-1].any()
    assert 0.45 < chosen.sum() / (seen & (whole >= 5)).sum() < 0.55
    assert batch.inputs["attention_mask"][-1].tolist() == [1] + [0] * (rows.shape[1] - 1)


def test_dynamic_masks_change_each_epoch_and_static_ones_do_not(tmp_path: Path) -> None:
    for masking, same in (("static", True), ("dynamic", False)):
        samples = samples_of(given(tmp_path), config_of(config(masking)), vocabulary=VOCABULARY)
        epochs = []
        for epoch in range(2):
            (batch,) = samples.train_batches([range(epoch * samples.train_size, (epoch + 1) * samples.train_size)])
            rows, labels = batch.inputs["input_ids"].numpy(), batch.targets["labels"].numpy()
            whole = np.where(labels == IGNORE, rows, labels)
            epochs.append({int(w[1]): tuple(r.tolist()) for w, r in zip(whole, rows, strict=True)})
        assert (epochs[0] == epochs[1]) is same
        held = [samples.validation_batch(range(samples.validation_size)).inputs["input_ids"] for _ in range(2)]
        assert (held[0] == held[1]).all()


def test_padding_is_not_hidden_whatever_fills_it_up() -> None:
    used = np.array([True, False])
    framed = Frame(None, 3, pad=7).join(ragged([[10, 11], []]), empty(2), paired=~used & used, used=used, limit=32)
    task = TaskConfig.model_validate({"kind": "masked_lm", "mask_probability": 0.999})
    batch = collate_masked(framed, keys_of(1, np.arange(2)), config=task, vocab=VOCABULARY, sample_ids=[0, -1])
    assert batch.targets["labels"].tolist() == [[10, 11] + [IGNORE] * 6, [IGNORE] * 8]
