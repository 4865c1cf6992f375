from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distllm.config.check import resolve_layout
from distllm.config.errors import ConfigError, DataError
from distllm.data import pack
from distllm.data.batch import IGNORE
from distllm.data.pack import PackedExamples, first_fit
from tests.data.examples import ROLES, Given, config_of, store_of

S = 16


def chats(count: int = 60, *, first: int = 100) -> tuple[list[list[int]], list[list[int]]]:
    """Conversations in which no token comes twice, and flags: the second half of each is to be learned."""
    lengths = np.random.default_rng(1).integers(2, 11, size=count)
    ends = first + np.cumsum(lengths)
    texts = [list(range(end - n, end)) for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)]
    return texts, [[int(2 * i >= len(text)) for i in range(len(text))] for text in texts]


def packed(folder: Path, *, text: Any = None, flags: Any = None, **data: Any) -> PackedExamples:
    texts, learned = chats()
    store = store_of(folder, text=text or texts, flags=flags or learned)
    config = config_of("sft", **{"seq_len": S, "validation": {"fraction": 0.2}, **data})
    return PackedExamples(Given((store,)), config, resolved=resolve_layout(config, 1), roles=ROLES)  # type: ignore[arg-type]


def test_first_fit_fills_rows_and_cuts_no_text() -> None:
    lengths = np.array([6, 5, 5, 4, 10, 3, 1, 7])
    bins = first_fit(lengths, room=10)
    rows = [bins.members[a:b].tolist() for a, b in pairwise(bins.bounds)]
    assert rows == [[0, 3], [1, 2], [4], [5, 6], [7]]
    assert bins.filled.tolist() == [10, 10, 10, 4, 7]


def test_packing_many_texts_wastes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "OPEN", 4)
    lengths = np.random.default_rng(1).integers(1, 60, size=2000)
    bins = first_fit(lengths, room=100)
    assert sorted(bins.members.tolist()) == list(range(2000))
    assert bins.filled.max() <= 100 and bins.filled.mean() > 85
    assert bins.filled.tolist() == [int(lengths[bins.members[a:b]].sum()) for a, b in pairwise(bins.bounds)]


def test_every_conversation_comes_once_an_epoch_in_one_row(tmp_path: Path) -> None:
    samples = packed(tmp_path)
    held = samples.validation_batch(range(samples.validation_size))
    orders = []
    for epoch in range(2):
        (batch,) = samples.train_batches([range(epoch * samples.train_size, (epoch + 1) * samples.train_size)])
        seen = Counter[tuple[int, ...]]()
        for some in (batch, held):
            for row, places in zip(some.inputs["input_ids"].tolist(), some.inputs["position_ids"].tolist(), strict=True):
                cuts = [i for i, place in enumerate(places) if place == 0] + [S]
                seen.update(tuple(row[a:b]) for a, b in pairwise(cuts) if row[a] != 1)
        assert seen == Counter(tuple(text) for text in chats()[0])
        orders.append(batch.inputs["input_ids"][:, 0].tolist())
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_only_flagged_tokens_are_learned_and_only_from_their_own_conversation(tmp_path: Path) -> None:
    samples = packed(tmp_path)
    (batch,) = samples.train_batches([[*range(samples.train_size), -1]])
    learned = {token for text, flags in zip(*chats(), strict=True) for token, flag in zip(text, flags, strict=True) if flag}
    ids, labels = batch.inputs["input_ids"].numpy(), batch.targets["labels"].numpy()
    row, column = np.nonzero(labels != IGNORE)
    assert (labels[row, column] == ids[row, column] + 1).all(), "the next token of the same conversation"
    assert (ids[row, column + 1] == labels[row, column]).all()
    inside = set(ids[ids > 1].tolist())
    assert set(labels[row, column].tolist()) == learned & inside
    assert (labels[-1] == IGNORE).all() and (ids[-1] == 1).all()


def test_the_first_token_of_a_conversation_is_never_a_label(tmp_path: Path) -> None:
    texts, _ = chats()
    samples = packed(tmp_path, text=texts, flags=[[1] * len(text) for text in texts])
    (batch,) = samples.train_batches([range(samples.train_size)])
    labels = set(batch.targets["labels"].flatten().tolist())
    assert not labels & {text[0] for text in texts} and len(labels) > 100


def test_attention_stays_inside_a_conversation(tmp_path: Path) -> None:
    (batch,) = packed(tmp_path).train_batches([[0, 1, -1]])
    places, mask = batch.inputs["position_ids"].numpy(), batch.inputs["attention_mask"].numpy()
    for row in range(3):
        for query in range(S):
            assert np.flatnonzero(mask[row, 0, query]).tolist() == list(range(query - places[row, query], query + 1))


def test_batches_do_not_depend_on_how_they_are_asked_for(tmp_path: Path) -> None:
    samples = packed(tmp_path)
    (whole,) = samples.train_batches([range(8)])
    for i, batch in enumerate(samples.train_batches([[i] for i in range(8)])):
        assert (batch.inputs["input_ids"] == whole.inputs["input_ids"][i]).all() and batch.sample_ids == (i,)
    assert samples.tokens(range(8)) == int((whole.inputs["input_ids"] != 1).sum())


@pytest.mark.parametrize(
    ("rule", "want"),
    [("head", [*range(100, 116)]), ("tail", [*range(104, 120)]), ("middle", [*range(100, 108), *range(112, 120)])],
)
def test_a_long_conversation_is_cut_by_the_rule(tmp_path: Path, rule: str, want: list[int]) -> None:
    text, flags = [list(range(100, 120))] * 2, [[0] * 10 + [1] * 10] * 2
    (batch,) = packed(tmp_path, text=text, flags=flags, truncate=rule).train_batches([[0]])
    assert batch.inputs["input_ids"].tolist() == [want]
    labels = batch.targets["labels"][0].tolist()
    assert [label for label in labels if label != IGNORE] == [token for token in want[1:] if token >= 110]


def test_a_long_conversation_is_refused_before_training(tmp_path: Path) -> None:
    text, flags = [list(range(100, 120))] * 2, [[0] * 10 + [1] * 10] * 2
    want = r"1 of 1 examples of data.sources.0 are longer .* whose conversation takes 20 tokens .* nearest: data.seq_len=20"
    with pytest.raises(DataError, match=want):
        packed(tmp_path, text=text, flags=flags)
    with pytest.raises(ConfigError, match=r"data.truncate=window: is not for conversations"):
        packed(tmp_path, truncate="window")
