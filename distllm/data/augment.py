"""Changes of training texts, drawn for each (seed, sample, epoch): never more than a function of the key.

Deletion, swap, insertion and synonyms as in Wei and Zou 2019 (arXiv 1901.11196). B rows, T tokens in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distllm.config.errors import ConfigError, DataError
from distllm.config.places import missing
from distllm.config.schema import AugmentConfig
from distllm.data.masking import MaskVocabulary, below
from distllm.data.order import mix
from distllm.data.ragged import Ragged

_BACK, _SYNONYM, _WHICH, _DELETE, _SWAP, _INSERT, _INSERTED, _MASK = range(8)


@dataclass(frozen=True)
class Synonyms:
    """Words as token ids, and what can stand for them."""

    words: Mapping[tuple[int, ...], tuple[tuple[int, ...], ...]]
    """The synonyms of each word, as it is written after a space and at the beginning of a text."""
    first: np.ndarray
    """bool [V], the tokens that such words begin with."""
    longest: int
    """Tokens of the longest word."""


@dataclass(frozen=True)
class Augmenter:
    """How training texts are changed."""

    config: AugmentConfig
    vocabulary: MaskVocabulary | None = None
    """For synonyms, which stand for whole words, and for mask."""
    synonyms: Synonyms | None = None

    def goes_back(self, keys: np.ndarray) -> np.ndarray:
        """Whether each text, uint64 [B], is replaced by its back-translation: bool [B]."""
        return below(_draw(keys, np.zeros(len(keys), dtype=np.int64), _BACK), self.config.back_translation)

    def longest(self, lengths: np.ndarray) -> np.ndarray:
        """How many tokens a changed text has at most, int64: what grows beyond it is cut off.

        A step with a budget of tokens has to know it beforehand: twice the expected growth, and 8 tokens.
        """
        growth = 2 * self.config.insert + (self.config.synonym if self.synonyms else 0.0)
        return lengths + (np.ceil(lengths * growth).astype(np.int64) + 8 if growth else 0)

    def change(self, rows: Ragged, keys: np.ndarray, *, limit: np.ndarray) -> Ragged:
        """Change texts.

        Args:
            rows: the texts.
            keys: what the change is a function of, uint64 [B].
            limit: the most tokens of each, int64 [B].
        """
        config = self.config
        if config.synonym and self.synonyms is not None:
            rows = self._with_synonyms(rows, keys)
        if config.delete:
            rows = delete(rows, keys, probability=config.delete)
        if config.swap:
            rows = swap(rows, keys, probability=config.swap)
        if config.insert:
            rows = insert(rows, keys, probability=config.insert)
        if config.mask:
            assert self.vocabulary is not None and self.vocabulary.mask is not None
            hidden = below(_draw(keys[rows.row], rows.column, _MASK), config.mask)
            rows = Ragged(np.where(hidden, self.vocabulary.mask, rows.ids), rows.lengths)
        return rows.chosen(rows.column < limit[rows.row]) if (rows.lengths > limit).any() else rows

    def _with_synonyms(self, rows: Ragged, keys: np.ndarray) -> Ragged:
        """Put synonyms in the place of whole words."""
        table, vocabulary = self.synonyms, self.vocabulary
        assert table is not None and vocabulary is not None
        starts = np.append(vocabulary.starts_word[rows.ids] | (rows.column == 0), True)
        starts[1:-1] |= vocabulary.alone[rows.ids[:-1]]
        drawn = below(_draw(keys[rows.row], rows.column, _SYNONYM), self.config.synonym)
        which = _draw(keys[rows.row], rows.column, _WHICH)
        ends = np.append(np.flatnonzero(starts), len(rows.ids))
        pieces, taken, lengths = [], 0, rows.lengths.copy()
        for at in np.flatnonzero(drawn & table.first[rows.ids] & starts[:-1]).tolist():
            end = int(ends[np.searchsorted(ends, at, side="right")])
            others = table.words.get(tuple(rows.ids[at:end].tolist())) if end - at <= table.longest else None
            if others is not None:
                other = others[int(which[at] % np.uint64(len(others)))]
                pieces += [rows.ids[taken:at], np.array(other, dtype=np.int64)]
                lengths[rows.row[at]] += len(other) - (end - at)
                taken = end
        return Ragged(np.concatenate([*pieces, rows.ids[taken:]]), lengths) if pieces else rows


def delete(rows: Ragged, keys: np.ndarray, *, probability: float) -> Ragged:
    """Drop each token with a probability; of a text at least one stays."""
    draws = _draw(keys[rows.row], rows.column, _DELETE)
    keep = ~below(draws, probability)
    left = np.bincount(rows.row[keep], minlength=len(rows.lengths))
    for row in np.flatnonzero((left == 0) & (rows.lengths > 0)).tolist():
        start = int(rows.starts[row])
        keep[start + int(draws[start : start + int(rows.lengths[row])].argmax())] = True
    return rows.chosen(keep)


def swap(rows: Ragged, keys: np.ndarray, *, probability: float) -> Ragged:
    """Let each token change places with its right neighbour with a probability; a token that has moved does not again."""
    last = rows.column == rows.lengths[rows.row] - 1
    moves = below(_draw(keys[rows.row], rows.column, _SWAP), probability) & ~last
    # Of a run of neighbours that all want to move, every second one does.
    place = np.arange(len(moves))
    began = np.maximum.accumulate(np.where(moves & ~np.concatenate([[False], moves[:-1]]), place, 0)) if len(moves) else place
    at = np.flatnonzero(moves & ((place - began) % 2 == 0))
    ids = rows.ids.copy()
    ids[at], ids[at + 1] = rows.ids[at + 1], rows.ids[at]
    return Ragged(ids, rows.lengths)


def insert(rows: Ragged, keys: np.ndarray, *, probability: float) -> Ragged:
    """Put, with a probability, a random token of the same text after each token."""
    more = below(_draw(keys[rows.row], rows.column, _INSERT), probability)
    if not more.any():
        return rows
    at = np.flatnonzero(more)
    row = rows.row[at]
    random = (_draw(keys[row], rows.column[at], _INSERTED) % rows.lengths[row].astype(np.uint64)).astype(np.int64)
    ids = np.insert(rows.ids, at + 1, rows.ids[rows.starts[row] + random])
    return Ragged(ids, rows.lengths + np.bincount(row, minlength=len(rows.lengths)))


def _draw(keys: np.ndarray, column: np.ndarray, what: int) -> np.ndarray:
    """A uniform uint64 for each token, of its row's key, its place and what it is drawn for."""
    return mix(keys ^ mix(column.astype(np.uint64) * np.uint64(16) + np.uint64(what)))


def make_augmenter(config: AugmentConfig, tokenizer: Any) -> Augmenter | None:
    """What changes training texts; None where nothing does.

    Args:
        config: which changes.
        tokenizer: of transformers.

    Raises:
        ConfigError: synonyms are asked for without a table.
        DataError: the table cannot be read.
    """
    if not any((config.delete, config.swap, config.insert, config.mask, config.synonym, config.back_translation)):
        return None
    if not config.synonym:
        return Augmenter(config, MaskVocabulary.of(tokenizer) if config.mask else None)
    if config.synonyms is None:
        raise ConfigError([f"data.augment.synonym={config.synonym}: needs a table in data.augment.synonyms; nearest: 0"])
    return Augmenter(config, MaskVocabulary.of(tokenizer), read_synonyms(Path(config.synonyms), tokenizer))


def read_synonyms(path: Path, tokenizer: Any) -> Synonyms:
    """Read a table with a line `word<TAB>synonym<TAB>synonym...` a word.

    Raises:
        DataError: there is no such file, or a line has no synonym.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(missing("data.augment.synonyms", path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.augment.synonyms={path}: cannot be read: {' '.join(str(error).split())}") from None
    words: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}
    for number, line in enumerate(lines, start=1):
        word, *others = (part.strip() for part in line.split("\t"))
        if not line.strip():
            continue
        if not word or not others or not all(others):
            raise DataError(f"{path}:{number}: must be a word and its synonyms, with tabs between them, all with letters")
        for before in (" ", ""):
            ids = [tuple(tokenizer(before + text, add_special_tokens=False)["input_ids"]) for text in (word, *others)]
            if all(ids):
                words[ids[0]] = tuple(ids[1:])
    if not words:
        raise DataError(f"data.augment.synonyms={path}: holds no words; nearest: data.augment.synonym=0")
    first = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)
    first[[ids[0] for ids in words]] = True
    return Synonyms(words, first, max(map(len, words)))
