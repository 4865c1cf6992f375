from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distllm.config.schema import TaskConfig
from distllm.data.batch import IGNORE
from distllm.data.masking import MaskVocabulary, mask_rows
from distllm.data.order import keys_of

V = 1000
SPECIAL = np.arange(V) < 5
VOCABULARY = MaskVocabulary(4, SPECIAL, np.arange(V) % 3 == 0, np.zeros(V, dtype=bool))  # every third id begins a word


def rows_of(count: int, width: int = 64, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, V, size=(count, width))


def hidden(rows: np.ndarray, keys: np.ndarray, *, may: np.ndarray | None = None, **task: object) -> tuple[np.ndarray, np.ndarray]:
    config = TaskConfig.model_validate({"kind": "masked_lm", **task})
    given = np.ones(rows.shape, dtype=bool) if may is None else may
    return mask_rows(rows, keys, config=config, vocab=VOCABULARY, may=given)


def test_15_percent_are_hidden_of_which_80_10_10() -> None:
    rows = rows_of(2000)
    inputs, labels = hidden(rows, keys_of(1, np.arange(2000)))
    chosen = labels != IGNORE
    assert abs(chosen.mean() - 0.15) < 0.005
    assert (labels[chosen] == rows[chosen]).all() and (inputs[~chosen] == rows[~chosen]).all()
    masked, same = (inputs == 4)[chosen].mean(), (inputs == rows)[chosen].mean()
    assert abs(masked - 0.8) < 0.01 and abs(same - 0.1) < 0.01
    random = inputs[chosen & (inputs != 4) & (inputs != rows)]
    assert abs(len(random) / chosen.sum() - 0.1) < 0.01
    assert random.min() >= 5 and len(np.unique(random)) > 800, "random tokens come from all that are not special"
    assert np.abs(chosen.mean(axis=0) - 0.15).max() < 0.04, "every place is chosen about as often"


def test_a_row_is_a_function_of_its_key_alone() -> None:
    rows, keys = rows_of(8), keys_of(1, np.arange(8))
    inputs, labels = hidden(rows, keys)
    for i in (5, 0, 7):
        alone = hidden(rows[i : i + 1, :40], keys[i : i + 1])
        assert (alone[0][0] == inputs[i, :40]).all() and (alone[1][0] == labels[i, :40]).all()
    other = hidden(rows, keys_of(2, np.arange(8)))[1]
    assert 0.05 < ((other != IGNORE) & (labels != IGNORE)).sum() / (labels != IGNORE).sum() < 0.35


def test_special_tokens_and_padding_are_never_hidden() -> None:
    rows = rows_of(200)
    rows[:, 0], rows[:, 20] = 2, 3
    may = np.arange(64) < 40
    inputs, labels = hidden(rows, keys_of(1, np.arange(200)), may=np.broadcast_to(may, rows.shape), mask_probability=0.9)
    assert (labels[:, [0, 20]] == IGNORE).all() and (labels[:, 40:] == IGNORE).all()
    assert (inputs[:, 40:] == rows[:, 40:]).all() and (inputs[:, 0] == 2).all()


def test_whole_words_are_hidden_together() -> None:
    rows = rows_of(1000)
    rows[:, 30] = 3
    _, labels = hidden(rows, keys_of(1, np.arange(1000)), whole_words=True)
    chosen = labels != IGNORE
    follows = ~VOCABULARY.starts_word[rows[:, 1:]] & ~SPECIAL[rows[:, 1:]] & ~SPECIAL[rows[:, :-1]]
    assert (chosen[:, 1:] == chosen[:, :-1])[follows].all()
    assert abs(chosen[:, np.arange(64) != 30].mean() - 0.15) < 0.01
    _, apart = hidden(rows, keys_of(1, np.arange(1000)))
    assert not ((apart != IGNORE)[:, 1:] == (apart != IGNORE)[:, :-1])[follows].all()


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind == "byte-level":
        words = ["he", "llo", "Ġhe", "Ġ", ",", "Ċ", "'t", "Ã", "ĠÃ"]
        inner, pre, decoder = models.BPE, pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    else:
        words = {
            "word-piece": ["he", "##llo", ",", "##,"],
            "sentence-piece": ["▁he", "llo", ",", "▁", "é"],
            "characters": ["h", " ", "é", ",", "\n"],
        }[kind]
        inner, pre, decoder = models.BPE, pre_tokenizers.Whitespace(), decoders.Fuse()
    vocabulary = {"<s>": 0, "<mask>": 1, **{word: i + 2 for i, word in enumerate(words)}}
    made = Tokenizer(inner(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre, decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", mask_token="<mask>")


@pytest.mark.parametrize(
    ("kind", "starts", "alone"),
    [
        ("byte-level", ["Ġhe", "Ġ", ",", "Ċ", "'t", "ĠÃ"], [",", "Ċ"]),
        ("word-piece", ["he", ","], [","]),
        ("sentence-piece", ["▁he", ",", "▁"], [","]),
        ("characters", [" ", ",", "\n"], [",", "\n"]),
    ],
)
def test_words_are_known_by_each_kind_of_tokenizer(kind: str, starts: list[str], alone: list[str]) -> None:
    made = tokenizer(kind)
    vocabulary = MaskVocabulary.of(made)
    names = {i: token for token, i in made.get_vocab().items()}
    plain = [i for i in sorted(names) if i > 1]
    assert [names[i] for i in plain if vocabulary.starts_word[i]] == starts
    assert [names[i] for i in plain if vocabulary.alone[i]] == alone
    assert vocabulary.mask == 1 and vocabulary.special.tolist() == [True, True] + [False] * len(plain)
    assert vocabulary.ordinary.tolist() == plain


def test_a_word_begins_after_a_line_break() -> None:
    ids = tokenizer("byte-level").get_vocab()
    row = np.array([[ids[t] for t in ("he", "llo", "Ġhe", "llo", ",", "Ċ", "he", "llo")]])
    vocabulary = MaskVocabulary.of(tokenizer("byte-level"))
    assert vocabulary.word_starts(row)[0].tolist() == [True, False, True, False, True, True, True, False]
