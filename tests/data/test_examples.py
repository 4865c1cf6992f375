from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm.config.errors import ConfigError, DataError
from distllm.data.augment import Augmenter
from distllm.data.batch import IGNORE, Batch
from distllm.data.examples import ExampleSamples
from distllm.data.loader import step_batches, validation_batches
from tests.data.examples import FIRST, Given, config_of, samples_of, store_of, texts


def classes(folder: Path, count: int = 50, *, name: str = "made", first: int = FIRST, **more: Any) -> Any:
    """A store whose example i begins with the token first + i and has the label i % 3."""
    return store_of(folder, name, text=texts(count, first=first, **more), labels=[i % 3 for i in range(count)])


def named(batch: Batch) -> list[int]:
    """The first token after the begin token of each row: which example it is; 1 for padding."""
    return batch.inputs["input_ids"][:, 1].tolist()


def of_ranks(samples: ExampleSamples, *, ranks: int, steps: int, start: int = 0) -> list[tuple[int, list[int], int]]:
    """For each row of some steps, all ranks together: the sample, its tokens, its label."""
    rows = []
    sources = [step_batches(samples, start=start, dp_rank=r, dp_size=ranks, prefetch=4, pin=False) for r in range(ranks)]
    for source in [source for _ in range(steps) for source in sources]:
        for batch in next(source).microbatches:
            ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
            for i, n in enumerate(batch.sample_ids):
                rows.append((n, ids[i][mask[i]].tolist(), int(batch.targets["labels"][i])))
    for source in sources:
        source.close()
    return rows


@pytest.mark.parametrize("train", [{"global_batch": 8, "micro_batch": 2}, {"batch_tokens": 200}])
def test_any_number_of_ranks_trains_on_the_same_samples(tmp_path: Path, train: dict[str, int]) -> None:
    stores = (classes(tmp_path), classes(tmp_path, 31, name="other", first=500))
    seen = []
    for ranks in (1, 2, 4):
        config = config_of("classification", train=train, sources=[{"weight": 2.0}, {"weight": 1.0}])
        rows = of_ranks(samples_of(Given(stores), config, ranks=ranks), ranks=ranks, steps=6)
        assert all(label == IGNORE and tokens == [1] for n, tokens, label in rows if n < 0), "padding has no weight"
        seen.append(sorted(row for row in rows if row[0] >= 0))
        assert [row[0] for row in seen[-1]] == list(range(len(seen[-1])))
    assert seen[0] == seen[1] == seen[2]


def test_an_epoch_has_every_training_example_once_with_its_label(tmp_path: Path) -> None:
    samples = samples_of(Given((classes(tmp_path),)), config_of("classification", validation={"fraction": 0.2}))
    held = samples.validation_batch(range(samples.validation_size))
    for epoch in range(2):
        numbers = range(epoch * samples.train_size, (epoch + 1) * samples.train_size)
        (batch,) = samples.train_batches([numbers])
        assert sorted(named(batch) + named(held)) == [FIRST + i for i in range(50)]
        assert batch.targets["labels"].tolist() == [(first - FIRST) % 3 for first in named(batch)]
    assert samples.validation_size == 50 - samples.train_size > 0


def test_how_many_positions_are_looked_up_together_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, config = classes(tmp_path), config_of("classification")
    firsts = []
    for at_once in (4096, 7):
        monkeypatch.setattr("distllm.data.examples.AT_ONCE", at_once)
        firsts.append(named(samples_of(Given((store,)), config).train_batches([[30, 5, 6, 7, 20]])[0]))
    assert firsts[0] == firsts[1] and len(set(firsts[0])) == 5


def test_validation_batches_have_every_example_once_on_any_number_of_ranks(tmp_path: Path) -> None:
    stores = (classes(tmp_path, 23),)
    config = config_of("classification", validation={"sources": [{}, {}]})
    samples = samples_of(Given(stores, (classes(tmp_path, 7, name="a"), classes(tmp_path, 4, name="b", first=900))), config)
    assert samples.train_size == 23 and samples.validation_size == 11
    for ranks in (1, 2, 4):
        seen = Counter[int]()
        for rank in range(ranks):
            for batch in validation_batches(samples, micro_batch=2, dp_rank=rank, dp_size=ranks, limit=0):
                seen.update(first for first, n in zip(named(batch), batch.sample_ids, strict=True) if n >= 0)
                assert all(label == IGNORE for label, n in zip(batch.targets["labels"], batch.sample_ids, strict=True) if n < 0)
        assert seen == Counter([*range(FIRST, FIRST + 7), *range(900, 904)])


@pytest.mark.parametrize("fraction", [1e-9, 0.999999999])
def test_neither_side_is_empty(tmp_path: Path, fraction: float) -> None:
    samples = samples_of(Given((classes(tmp_path, 3),)), config_of("classification", validation={"fraction": fraction}))
    assert sorted([samples.train_size, samples.validation_size]) == [1, 2]


def test_by_position_the_last_examples_are_held_out(tmp_path: Path) -> None:
    held = {"by": "position", "fraction": 0.1}
    samples = samples_of(Given((classes(tmp_path, 20),)), config_of("classification", validation=held))
    assert named(samples.validation_batch([0, 1])) == [FIRST + 18, FIRST + 19] and samples.validation_size == 2


def test_one_example_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 0 is one example and cannot be divided; give more, or data.validation.sources"):
        samples_of(Given((classes(tmp_path, 1),)), config_of("classification"))


@pytest.mark.parametrize(("rule", "want"), [("head", [0, 1, 2, 3]), ("tail", [6, 7, 8, 9]), ("middle", [0, 1, 8, 9])])
def test_long_texts_are_cut(tmp_path: Path, rule: str, want: list[int]) -> None:
    store = store_of(tmp_path, text=[[10 + i for i in range(10)]] * 4, labels=[0] * 4)
    samples = samples_of(Given((store,)), config_of("classification", seq_len=6, truncate=rule))
    (batch,) = samples.train_batches([[0]])
    assert batch.inputs["input_ids"].tolist() == [[2, *(10 + i for i in want), 3]]


def test_long_examples_are_refused_before_training(tmp_path: Path) -> None:
    store = store_of(tmp_path, text=[[10], [10] * 31, [10]], labels=[0, 1, 0])
    with pytest.raises(DataError, match=r"longest is example 1, whose input takes 33 tokens .* nearest: data.seq_len=33"):
        samples_of(Given((store,)), config_of("classification", validation={"fraction": 1e-9}))
    store = store_of(tmp_path, "pair", text=[[10]] * 3, target=[[10], [10] * 32, [10]])
    want = r"whose target takes 33 tokens .* data.truncate=head, tail or middle$"
    with pytest.raises(DataError, match=want):
        samples_of(Given((store,)), config_of("seq2seq"))


def test_windows_are_samples_with_their_documents_label(tmp_path: Path) -> None:
    store = store_of(tmp_path, text=[list(range(10, 10 + n)) for n in (3, 14, 9)], labels=[0, 1, 2])
    config = config_of("classification", seq_len=10, truncate="window", stride=3, validation={"sources": [{}]})
    samples = samples_of(Given((store,), (store,)), config)
    batch = samples.validation_batch([0, 1, 2, 3, 4, 5, -1])
    assert samples.validation_size == samples.train_size == 6  # 8 tokens of text fit: of 14 the tokens 0-7, 5-12, 10-13
    assert batch.targets["document"].tolist() == [0, 1, 1, 1, 2, 2, -1]
    assert batch.targets["labels"].tolist() == [0, 1, 1, 1, 2, 2, IGNORE]
    assert batch.inputs["input_ids"][2].tolist() == [2, 15, 16, 17, 18, 19, 20, 21, 22, 3]


@pytest.mark.parametrize(
    ("task", "data", "want"),
    [
        ("seq2seq", {"truncate": "window"}, "data.truncate=window: is for the classification and regression of single texts"),
        ("classification", {"truncate": "window", "stride": 30}, "data.stride=30: must be below the 30 text tokens of a window"),
        ("classification", {"seq_len": 2}, "data.seq_len=2: must hold 2 special tokens and one of text; nearest: 3"),
    ],
)
def test_rules_that_do_not_fit_are_refused(tmp_path: Path, task: str, data: dict[str, Any], want: str) -> None:
    store = store_of(tmp_path, text=[[10]] * 4, target=[[10]] * 4, labels=[0] * 4)
    with pytest.raises(ConfigError, match=re.escape(want)):
        samples_of(Given((store,)), config_of(task, **data))


def test_pairs_give_token_types_to_a_model_that_takes_them(tmp_path: Path) -> None:
    store = store_of(tmp_path, text=[[10, 11]] * 4, pair=[[20]] * 4, labels=[0.5] * 4)
    (batch,) = samples_of(Given((store,)), config_of("regression"), takes_token_types=True).train_batches([[0, -1]])
    assert batch.inputs["input_ids"].tolist() == [[2, 10, 11, 3, 20, 3, 1, 1], [1] * 8]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0] * 8]
    assert batch.targets["labels"].tolist() == [0.5, 0.0] and batch.targets["weight"].tolist() == [1.0, 0.0]


def test_translation_takes_text_and_target_of_the_same_example(tmp_path: Path) -> None:
    store = store_of(tmp_path, text=texts(40), target=texts(40, seed=3, first=300))
    samples = samples_of(Given((store,)), config_of("seq2seq"), decoder_start=1)
    (batch,) = samples.train_batches([range(samples.train_size)])
    starts = batch.inputs["decoder_input_ids"][:, 0]
    assert (starts == 1).all() and (batch.targets["labels"][:, 0] - 300).tolist() == [n - FIRST for n in named(batch)]
    real = batch.inputs["attention_mask"].sum() + batch.inputs["decoder_attention_mask"].sum()
    assert samples.tokens(range(samples.train_size)) == int(real)


def test_the_batch_grows(tmp_path: Path) -> None:
    train = {"micro_batch": 2, "global_batch": 8, "batch_ramp": 16}
    samples = samples_of(Given((classes(tmp_path),)), config_of("classification", train=train), ranks=2)
    sizes, at = [], 0
    for _ in range(5):
        plan = samples.step(at)
        sizes.append(len(plan.samples))
        assert plan.micro_batch == 2 and plan.accumulation * 4 == len(plan.samples)
        at = plan.samples.stop
    assert sizes[0] == 4 and sizes[-1] == 8 and sizes == sorted(sizes)


def _augmented(folder: Path, **more: Any) -> ExampleSamples:
    augment = {"delete": 0.2, "swap": 0.3, "insert": 0.2, "back_translation": 0.5}
    config = config_of("classification", augment=augment, validation={"fraction": 0.2}, **more)
    store = store_of(folder, text=texts(40, longest=12), back=texts(40, seed=8, first=400), labels=[0] * 40)
    return samples_of(Given((store,)), config, augmenter=Augmenter(config.data.augment))


def test_augmentation_is_a_function_of_sample_and_epoch_and_leaves_validation_alone(tmp_path: Path) -> None:
    samples = _augmented(tmp_path)
    size = samples.train_size
    (whole,) = samples.train_batches([range(2 * size)])
    again = _augmented(tmp_path).train_batches([[i] for i in reversed(range(2 * size))])
    for i, batch in enumerate(reversed(again)):
        width = batch.inputs["input_ids"].shape[1]
        assert torch.equal(batch.inputs["input_ids"][0], whole.inputs["input_ids"][i, :width])
    text = {n: row for n, row in enumerate(texts(40, longest=12))}
    held = samples.validation_batch(range(samples.validation_size))
    for row in held.inputs["input_ids"].tolist():
        assert row[1 : row.index(3)] == text[row[1] - FIRST]
    first, second = (whole.inputs["input_ids"][e * size : (e + 1) * size].tolist() for e in range(2))
    assert len({tuple(row) for row in first} & {tuple(row) for row in second}) < size / 2, "each epoch has other changes"
    back = sum(any(token >= 400 for token in row) for row in first + second) / (2 * size)
    assert 0.3 < back < 0.7, "about half of the texts are back-translated"


def test_augmented_rows_keep_to_the_budget(tmp_path: Path) -> None:
    samples = _augmented(tmp_path, train={"batch_tokens": 200})
    at = 0
    while at < 3 * samples.train_size:
        step = samples.step(at).samples
        (batch,) = samples.train_batches([list(step)])
        assert batch.inputs["input_ids"].numel() <= 200
        at = step.stop
