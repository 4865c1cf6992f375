from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import AugmentConfig
from distllm.data.augment import Augmenter, delete, insert, make_augmenter, read_synonyms, swap
from distllm.data.masking import MaskVocabulary
from distllm.data.order import keys_of
from distllm.data.ragged import Ragged, ragged
from distllm.data.tokenizer import train_bpe, wrap

MANY = np.full(400, 1000, dtype=np.int64)


def rows(count: int = 200, length: int = 20) -> Ragged:
    """Rows in which no token comes twice."""
    return ragged([list(range(100, 100 + length)) for _ in range(count)])


def listed(what: Ragged) -> list[list[int]]:
    return [what.ids[a:b].tolist() for a, b in zip(what.bounds, what.bounds[1:], strict=False)]


def keys(count: int = 200, epoch: int = 0) -> np.ndarray:
    return keys_of(1, 0, np.arange(count), epoch)


def test_deletion_drops_the_share_and_keeps_the_order() -> None:
    out = listed(delete(rows(), keys(), probability=0.3))
    assert abs(sum(map(len, out)) / 4000 - 0.7) < 0.03
    assert all(row == sorted(row) for row in out)


def test_at_least_one_token_stays() -> None:
    out = delete(ragged([[7], [8, 9], [], [5] * 3]), keys(4), probability=0.9999)
    assert out.lengths.tolist() == [1, 1, 0, 1]


def test_swap_exchanges_neighbours_of_the_same_text() -> None:
    out = listed(swap(rows(), keys(), probability=0.3))
    moved = 0
    for row in out:
        assert sorted(row) == list(range(100, 120)) and all(abs(t - 100 - i) <= 1 for i, t in enumerate(row))
        moved += sum(t != 100 + i for i, t in enumerate(row))
    assert abs(moved / 2 / 4000 - 0.3 / 1.3) < 0.02, "a token that has moved stays"
    assert listed(swap(rows(3, 2), keys(3), probability=0.9999)) == [[101, 100]] * 3
    assert listed(swap(rows(1, 4), keys(1), probability=0.9999)) == [[101, 100, 103, 102]]
    assert listed(swap(ragged([[1], [2]]), keys(2), probability=0.9999)) == [[1], [2]]


def test_insertion_adds_tokens_of_the_same_text() -> None:
    given = ragged([list(range(20 * i, 20 * i + 20)) for i in range(200)])
    out = listed(insert(given, keys(), probability=0.2))
    assert abs(sum(map(len, out)) / 4000 - 1.2) < 0.03
    for i, row in enumerate(out):
        extra = Counter(row) - Counter(range(20 * i, 20 * i + 20))
        assert set(extra) <= set(range(20 * i, 20 * i + 20)) and len(row) - sum(extra.values()) == 20


def test_a_change_is_a_function_of_the_key_alone() -> None:
    augmenter = Augmenter(AugmentConfig(delete=0.2, swap=0.2, insert=0.2))
    whole = listed(augmenter.change(rows(50), keys(50), limit=MANY[:50]))
    for i in (49, 3):
        assert listed(augmenter.change(rows(1), keys(50)[i : i + 1], limit=MANY[:1])) == [whole[i]]
    assert whole != listed(augmenter.change(rows(50), keys(50, epoch=1), limit=MANY[:50]))


def test_what_grows_beyond_the_limit_is_cut() -> None:
    augmenter = Augmenter(AugmentConfig(insert=0.9))
    out = augmenter.change(rows(50), keys(50), limit=np.full(50, 25))
    assert out.lengths.max() == 25
    assert augmenter.longest(np.array([10])).tolist() == [36]
    assert Augmenter(AugmentConfig(delete=0.5)).longest(np.array([10])).tolist() == [10]


def test_tokens_become_the_mask() -> None:
    vocabulary = MaskVocabulary(4, np.zeros(200, dtype=bool), np.ones(200, dtype=bool), np.zeros(200, dtype=bool))
    out = Augmenter(AugmentConfig(mask=0.25), vocabulary).change(rows(), keys(), limit=MANY[:200])
    assert abs((out.ids == 4).mean() - 0.25) < 0.03 and (out.lengths == 20).all()


def test_back_translation_has_its_share() -> None:
    augmenter = Augmenter(AugmentConfig(back_translation=0.3))
    assert abs(augmenter.goes_back(keys(2000)).mean() - 0.3) < 0.04
    assert Augmenter(AugmentConfig(back_translation=1.0)).goes_back(keys(2000)).all()


def test_synonyms_stand_for_whole_words(tmp_path: Path) -> None:
    tokenizer = wrap(train_bpe(["good film, goodness! a good movie and a bad one"] * 50, vocab_size=300), has_unknown=False)
    table = tmp_path / "synonyms.tsv"
    table.write_text("good\tfine\tgreat\nfilm\tmotion picture\n\n", encoding="utf-8")
    augmenter = make_augmenter(AugmentConfig(synonym=0.999, synonyms=str(table)), tokenizer)
    assert augmenter is not None
    given = ragged([tokenizer(text)["input_ids"] for text in ["good film, goodness!", "a bad one\ngood", "dogood"] * 20])
    out = {tokenizer.decode(row) for row in listed(augmenter.change(given, keys(60), limit=MANY[:60]))}
    want = ["fine motion picture, goodness!", "great motion picture, goodness!", "a bad one\nfine", "a bad one\ngreat", "dogood"]
    assert out == set(want)


@pytest.mark.parametrize(("text", "want"), [("good\n", ":1: must be a word and its synonyms"), ("", "holds no words")])
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, want: str) -> None:
    tokenizer = wrap(train_bpe(["good"], vocab_size=258), has_unknown=False)
    (tmp_path / "table").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(want)):
        read_synonyms(tmp_path / "table", tokenizer)
    with pytest.raises(DataError, match=r"^data\.augment\.synonyms=.*none: no such file; nearest: "):
        read_synonyms(tmp_path / "none", tokenizer)
    with pytest.raises(ConfigError, match=r"needs a table in data.augment.synonyms; nearest: 0"):
        make_augmenter(AugmentConfig(synonym=0.1), tokenizer)
    assert make_augmenter(AugmentConfig(), tokenizer) is None
