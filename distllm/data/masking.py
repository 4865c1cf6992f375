"""Hiding tokens for a model to guess, as BERT does (Devlin et al. 2018, arXiv 1810.04805); a pure function of keys.

B rows, S tokens of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from distllm.config.schema import TaskConfig
from distllm.data.batch import IGNORE
from distllm.data.order import mix
from distllm.data.tokenizer import byte_letters

_BYTE_LEVEL, _WORD_PIECE, _SENTENCE_PIECE = "Ġ", "##", "▁"


@dataclass(frozen=True)
class MaskVocabulary:
    """What masking has to know of a tokenizer's V ids."""

    mask: int | None
    """None: the tokenizer has no mask token, and nothing can be hidden."""
    special: np.ndarray
    """bool [V]: special tokens and ids without a token, which are never hidden and never put in at random."""
    starts_word: np.ndarray
    """bool [V]: tokens that begin a word wherever they stand."""
    alone: np.ndarray
    """bool [V]: tokens without a letter or digit; after them a word begins."""

    @staticmethod
    def of(tokenizer: Any) -> MaskVocabulary:
        """Read a fast tokenizer of transformers: byte-level, WordPiece, SentencePiece or characters."""
        vocabulary = tokenizer.get_vocab()
        size = max(vocabulary.values()) + 1
        special, starts, alone = np.ones(size, dtype=bool), np.ones(size, dtype=bool), np.ones(size, dtype=bool)
        sign = _sign(vocabulary)
        specials = set(tokenizer.all_special_ids)
        for token, i in vocabulary.items():
            special[i] = i in specials
            if not special[i]:
                starts[i], alone[i] = _stands(token, sign)
        return MaskVocabulary(tokenizer.mask_token_id, special, starts, alone)

    def word_starts(self, rows: np.ndarray) -> np.ndarray:
        """Where words begin in rows of ids, bool [B, S]; a row begins with a word."""
        starts = self.starts_word[rows]
        starts[:, 0] = True
        starts[:, 1:] |= self.alone[rows[:, :-1]]
        return starts

    @property
    def ordinary(self) -> np.ndarray:
        """The ids of tokens that are not special, int64."""
        return np.flatnonzero(~self.special)


def _sign(vocabulary: dict[str, int]) -> str:
    """What a tokenizer writes where a word begins, or goes on; empty for single characters."""
    signs = (_BYTE_LEVEL, _WORD_PIECE, _SENTENCE_PIECE)
    counts = [sum(token.startswith(sign) and len(token) > len(sign) for token in vocabulary) for sign in signs]
    if any(counts):
        return signs[int(np.argmax(counts))]
    return _BYTE_LEVEL if _BYTE_LEVEL in vocabulary and " " not in vocabulary else ""


@lru_cache(maxsize=1)
def _byte_values() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(byte_letters())}


def _text(token: str, sign: str) -> str:
    """What a token of a vocabulary stands for; a part of a character is the replacement character."""
    if sign == _BYTE_LEVEL:
        values = _byte_values()
        if all(letter in values for letter in token):
            return bytes(values[letter] for letter in token).decode("utf-8", errors="replace")
    return token.replace(_SENTENCE_PIECE, " ") if sign == _SENTENCE_PIECE else token


def _stands(token: str, sign: str) -> tuple[bool, bool]:
    """Whether a token begins a word wherever it stands, and whether a word begins after it."""
    text = _text(token, sign)
    lettered = [c.isalnum() or c == "\ufffd" for c in text]
    if sign == _WORD_PIECE:
        goes_on = token.startswith(sign)
        return not goes_on, not goes_on and not any(lettered)
    # A space belongs to the word after it; any other run without letters stands for itself.
    return not (lettered and lettered[0]), not any(lettered) and text != " "


def _hash(keys: np.ndarray, width: int, salt: int) -> np.ndarray:
    """A uniform uint64 for every place of rows with these keys: [B, width]."""
    places = mix(np.arange(width, dtype=np.uint64) * np.uint64(8) + np.uint64(salt))
    return mix(keys[:, None] ^ places)


def below(hashes: np.ndarray, probability: float) -> np.ndarray:
    """Whether each uniform uint64 is in the first `probability` of all, bool."""
    return hashes < np.uint64(min(int(probability * 2.0**64), 2**64 - 1))


def mask_rows(
    rows: np.ndarray, keys: np.ndarray, *, config: TaskConfig, vocab: MaskVocabulary, may: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hide tokens.

    Args:
        rows: ids, int64 [B, S].
        keys: what the choice is a function of, uint64 [B]: of seed and sample and, for dynamic masking, the epoch.
        config: the probabilities, and whether words are hidden whole.
        vocab: of the tokenizer.
        may: bool [B, S], the places that can be chosen; padding is not. Special tokens never are.

    Returns:
        The inputs, int64 [B, S], where of the chosen tokens 80 % are the mask token and 10 % a random one (as `config` has
        it); and the labels, int64 [B, S]: the token itself where it was chosen, IGNORE elsewhere.
    """
    assert vocab.mask is not None, "the tokenizer is checked for it"
    width = rows.shape[1]
    chance = _hash(keys, width, 0)
    may = may & ~vocab.special[rows]
    if config.whole_words:
        starts = vocab.word_starts(rows) | ~may
        starts[:, 1:] |= ~may[:, :-1]
        first = np.maximum.accumulate(np.where(starts, np.arange(width), 0), axis=1)
        chance = np.take_along_axis(chance, first, axis=1)  # the tokens of a word share the number of its first
    chosen = may & below(chance, config.mask_probability)
    labels = np.where(chosen, rows, IGNORE)
    become = _hash(keys, width, 1)
    inputs = np.where(chosen & below(become, config.mask_token), vocab.mask, rows)
    random = chosen & ~below(become, config.mask_token) & below(become, min(1.0, config.mask_token + config.random_token))
    if random.any():
        ordinary = vocab.ordinary
        inputs[random] = ordinary[(_hash(keys, width, 2)[random] % np.uint64(len(ordinary))).astype(np.int64)]
    return inputs, labels
