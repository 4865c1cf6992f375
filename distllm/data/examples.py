"""Samples that are examples: a labelled text, a pair, a text and its target.

The i-th sample is a pure function of (seed, i). B samples of a batch, N samples of a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from distllm.config.check import Resolved
from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import Config, DataConfig
from distllm.data.augment import Augmenter
from distllm.data.batch import Batch
from distllm.data.bucket import Buckets, refuse_wide
from distllm.data.collate_classify import collate_classify
from distllm.data.collate_masked import collate_masked
from distllm.data.collate_multi import collate_multi
from distllm.data.collate_seq2seq import collate_seq2seq
from distllm.data.masking import MaskVocabulary
from distllm.data.order import Order, keys_of
from distllm.data.ragged import Frame, Ragged, all_rounded
from distllm.data.ramp import ramped
from distllm.data.samples import StepPlan
from distllm.data.side import Side, divide
from distllm.data.truncate import Kept, kept, refuse_long, shared_room, windows

if TYPE_CHECKING:
    from distllm.data.prepare import Prepared
    from distllm.data.tokenizer import Roles

AT_ONCE = 4096  # positions of the order that are looked up together
_AUGMENT, _VALIDATION = -6, -7  # parts of keys, so that what is drawn for one end does not depend on another


@dataclass(frozen=True)
class Rows:
    """What the examples of B samples are, ready to be collated."""

    text: Ragged
    pair: Ragged
    target: Ragged
    paired: np.ndarray
    """bool [B]."""
    used: np.ndarray
    """bool [B]; False is a row of padding, and all of its texts are empty."""
    labels: np.ndarray
    """float64 [B]."""
    task: np.ndarray
    """The number of each row's task, int64 [B]."""
    document: np.ndarray
    """int64 [B]; -1 for a row of padding."""
    keys: np.ndarray
    """What hidden tokens are a function of, uint64 [B]."""

    def part(self, first: int, last: int) -> Rows:
        """The rows [first, last)."""
        at = slice(first, last)
        return Rows(
            self.text.part(first, last), self.pair.part(first, last), self.target.part(first, last), self.paired[at],
            self.used[at], self.labels[at], self.task[at], self.document[at], self.keys[at],
        )  # fmt: skip


class ExampleSamples:
    """The samples of prepared examples, by number, as `samples.Samples` has it."""

    def __init__(
        self, prepared: Prepared, config: Config, *, resolved: Resolved, roles: Roles, takes_token_types: bool = False,
        decoder_start: int | None = None, vocabulary: MaskVocabulary | None = None, augmenter: Augmenter | None = None,
    ) -> None:  # fmt: skip
        """Divide the examples, measure them, and put them in order.

        Args:
            prepared: its example stores.
            config: `task`, `data`, `train` and `seed` are read.
            resolved: the batch.
            roles: the special tokens.
            takes_token_types: whether the model tells the texts of a pair apart by token types.
            decoder_start: seq2seq: the token that decoder inputs begin with; None: begin, else end.
            vocabulary: for tasks that hide tokens.
            augmenter: changes training texts; None leaves them.

        Raises:
            ConfigError: data.truncate does not go with the task or data.seq_len.
            DataError: an example is too long for its rule or for the budget, or a side has no examples.
        """
        self.vocab_size = prepared.vocab_size
        self._config, self._resolved, self._roles = config, resolved, roles
        self._types, self._vocabulary, self._augmenter = takes_token_types, vocabulary, augmenter
        pad = roles.eos if roles.pad is None else roles.pad
        self._frame = Frame(roles.begin, roles.eos if roles.separator is None else roles.separator, pad)
        self._start = next(i for i in (decoder_start, roles.begin, roles.eos) if i is not None)
        self._second = "target" if config.task.kind == "translation_lm" else "pair"
        self._seq2seq = config.task.kind == "seq2seq"
        self.train, self.validation = divide(
            prepared.examples, prepared.validation_examples, config=config.data.validation, seed=config.seed
        )
        self._fits(self.train, "data.sources")
        self._fits(self.validation, "data.validation.sources" if prepared.validation_examples else "data.sources")
        if config.data.truncate == "window":
            self.train, self.validation = self._windows(self.train), self._windows(self.validation)
        data, train = config.data, config.train
        self.order = Order(self.train.sizes, tuple(s.weight for s in data.sources), config.seed, data.shuffle)
        self._ends = np.cumsum(self.validation.sizes)
        every = [self.train.all_of(k) for k in range(len(self.train.stores))]
        self._tokens = [self._lengths(self.train, *some, grown=False).sum(axis=1) for some in every]
        self._blocks = lru_cache(maxsize=8)(self._block)
        self._tasks = {name: i for i, name in enumerate(config.task.tasks)}
        self._buckets: Buckets | None = None
        if train.batch_tokens is not None:
            for k, some in enumerate(every):
                widths = self._widths(*some).sum(axis=1)
                refuse_wide(
                    widths, budget=train.batch_tokens, where=f"data.sources.{k}", examples=self.train.examples[k]
                )
            self._buckets = Buckets(
                self._widths_at, epoch=self.train_size, budget=train.batch_tokens, seed=config.seed, shuffle=data.shuffle
            )

    @property
    def train_size(self) -> int:
        """Samples of an epoch, all sources together."""
        return sum(self.order.sizes)

    @property
    def validation_size(self) -> int:
        """Validation samples."""
        return int(self._ends[-1])

    def step(self, start: int) -> StepPlan:
        """The step that begins with the global sample number `start`: a fixed number of samples, or a budget of tokens."""
        if self._buckets is None:
            return ramped(start, resolved=self._resolved, samples=self._config.train.batch_ramp)
        samples, accumulation = self._buckets.step(start), self._resolved.accumulation
        return StepPlan(samples, accumulation, -(-len(samples) // (accumulation * self._resolved.dp_size)))

    def tokens(self, samples: range) -> int:
        """Input tokens of these training samples, without padding and before augmentation; both sides together."""
        source, sample, _ = self._located(np.arange(samples.start, samples.stop))
        return int(self.train.picked(self._tokens, source, sample).sum())

    def batch_bytes(self, size: int) -> int:
        """About how much memory a batch of `size` samples takes, in bytes, at the greatest length."""
        return size * self._config.data.seq_len * (40 if self._seq2seq else 24)

    def unigram_loss(self) -> None:
        """None: examples have no loss of word frequencies that a model's could be compared with."""
        return None

    def train_batches(self, ids: Sequence[Sequence[int]]) -> list[Batch]:
        """A batch for each list of global sample numbers; -1 is a row of padding."""
        numbers = np.array(list(chain.from_iterable(ids)), dtype=np.int64)
        used = numbers >= 0
        # A row of padding takes the place of a neighbour, whose block is at hand.
        source, sample, epoch = self._located(np.where(used, numbers, numbers.max(initial=0)))
        rows = self._rows(self.train, source, sample, used=used, epoch=epoch)
        cuts = accumulate((len(batch) for batch in ids), initial=0)
        return [
            self._collate(rows.part(first, last), batch) for batch, (first, last) in zip(ids, pairwise(cuts), strict=True)
        ]

    def validation_batch(self, ids: Sequence[int]) -> Batch:
        """The validation samples with these numbers, in the order of their sources; -1 is a row of padding."""
        number = np.array(ids, dtype=np.int64)
        used, number = number >= 0, np.maximum(number, 0)
        source = np.searchsorted(self._ends, number, side="right")
        sample = number - np.concatenate([[0], self._ends])[source]
        return self._collate(self._rows(self.validation, source, sample, used=used, epoch=None), ids)

    def _located(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, sample and epoch of global sample numbers."""
        return self._where(numbers if self._buckets is None else self._buckets.positions(numbers))

    def _where(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`Order.where` of positions that are close together: a permutation costs as much for one sample as for many."""
        block, within = np.divmod(positions, AT_ONCE)
        first, last = int(block.min()), int(block.max())
        if first == last:
            source, sample, epoch = self._blocks(first)
            return source[within], sample[within], epoch[within]
        out = np.empty((3, len(positions)), dtype=np.int64)
        for b in range(first, last + 1):
            mine = np.flatnonzero(block == b)
            out[:, mine] = [part[within[mine]] for part in self._blocks(b)]
        return out[0], out[1], out[2]

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.order.where(np.arange(number * AT_ONCE, (number + 1) * AT_ONCE))

    def _fits(self, side: Side, place: str) -> None:
        """Refuse lengths that the rule of truncation does not cover."""
        data, kind = self._config.data, self._config.task.kind
        paired = any(self._second in store.fields for store in side.stores)
        single = kind in ("classification", "regression") and not paired
        specials = int(self._frame.specials(np.array([paired]))[0])
        if not sum(side.sizes):
            raise DataError(f"{place}: no examples to evaluate on; give more, or data.validation.sources")
        _refuse_rule(data, specials=specials, single=single)
        rules = "head, tail, middle or window" if single else "head, tail or middle"
        for k in range(len(side.stores) if data.truncate == "refuse" else 0):
            source, sample = side.all_of(k)
            text, second = (side.lengths(field, source, sample) for field in ("text", self._second))
            lengths = {"input": text + second + self._frame.specials(side.has(self._second, source))}
            if self._seq2seq:
                lengths["target"] = side.lengths("target", source, sample) + 1
            for what, every in lengths.items():
                refuse_long(every, limit=data.seq_len, what=what, where=f"{place}.{k}", rules=rules, examples=side.examples[k])

    def _windows(self, side: Side) -> Side:
        """The windows of the examples of a side."""
        room = self._config.data.seq_len - int(self._frame.specials(np.zeros(1, dtype=bool))[0])
        examples, firsts = [], []
        for k, every in enumerate(side.examples):
            text, first = windows(side.lengths("text", *side.all_of(k)), room=room, stride=self._config.data.stride)
            examples.append(every[text])
            firsts.append(first)
        return Side(side.stores, tuple(examples), tuple(firsts))

    def _kept(self, side: Side, source: np.ndarray, sample: np.ndarray, text: np.ndarray) -> tuple[Kept, Kept]:
        """What stays of texts that have `text` tokens (int64 [B]) and of their second texts."""
        rule, limit = self._config.data.truncate, self._config.data.seq_len
        room = limit - self._frame.specials(side.has(self._second, source))
        if side.firsts is not None:
            first = side.first(source, sample)
            length = np.minimum(text - first, room)
            none = np.zeros_like(length)
            return Kept(length, none, first), Kept(none, none, none)
        second = side.lengths(self._second, source, sample)
        of_text, of_second = shared_room(text, second, room)
        return kept(text, of_text, rule=rule), kept(second, of_second, rule=rule)

    def _lengths(self, side: Side, source: np.ndarray, sample: np.ndarray, *, grown: bool) -> np.ndarray:
        """Tokens of the input and of the decoder's input of samples, int64 [B, sides]; `grown`: at most, after augmentation."""
        text = side.lengths("text", source, sample)
        if grown and self._augmenter is not None and self._augmenter.config.back_translation:
            text = np.maximum(text, side.lengths("back", source, sample))
        first, second = self._kept(side, source, sample, text)
        specials = self._frame.specials(side.has(self._second, source))
        of_text, of_second = first.length, second.length
        if grown:
            of_text, of_second = self._grown(of_text, of_second, self._config.data.seq_len - specials)
        sides = [of_text + of_second + specials]
        if self._seq2seq:
            sides.append(np.minimum(side.lengths("target", source, sample) + 1, self._config.data.seq_len))
        return np.stack(sides, axis=1)

    def _grown(self, text: np.ndarray, second: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How long augmented texts can get."""
        if self._augmenter is None:
            return text, second
        of_text = np.minimum(self._augmenter.longest(text), room - second)
        if self._second == "target":
            return of_text, second
        return of_text, np.minimum(self._augmenter.longest(second), room - of_text)

    def _widths(self, source: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """The widths that training samples are padded to at least, int64 [B, sides]."""
        return all_rounded(self._lengths(self.train, source, sample, grown=True), limit=self._config.data.seq_len)

    def _widths_at(self, positions: np.ndarray) -> np.ndarray:
        source, sample, _ = self._where(positions)
        return self._widths(source, sample)

    def _rows(self, side: Side, source: np.ndarray, sample: np.ndarray, *, used: np.ndarray, epoch: np.ndarray | None) -> Rows:
        """Read, cut and augment the examples of samples; `epoch` is None in validation, where nothing is random."""
        config, augmenter = self._config, self._augmenter if epoch is not None else None
        example, first = side.example(source, sample), side.first(source, sample)
        keys = keys_of(config.seed, _AUGMENT, source, example, first, 0 if epoch is None else epoch)
        length, field = side.lengths("text", source, sample), None
        back = augmenter.goes_back(keys) & side.has("back", source) if augmenter is not None else np.zeros_like(used)
        if back.any():
            length, field = np.where(back, side.lengths("back", source, sample), length), "back"
        of_text, of_second = self._kept(side, source, sample, length)
        text = side.read("text", source, sample, _only(of_text, used & ~back))
        if field is not None:
            text = _merged(text, side.read(field, source, sample, _only(of_text, used & back)))
        second = side.read(self._second, source, sample, _only(of_second, used))
        paired = side.has(self._second, source) & used
        if augmenter is not None:
            room = config.data.seq_len - self._frame.specials(paired)
            caps = self._grown(of_text.length, of_second.length, room)
            text = augmenter.change(text, keys, limit=caps[0])
            if self._second == "pair":
                second = augmenter.change(second, keys_of(keys, 1), limit=caps[1])
        target = Ragged(np.zeros(0, dtype=np.int64), np.zeros_like(length))
        if self._seq2seq:
            room = np.full_like(length, config.data.seq_len - 1)
            of_target = kept(side.lengths("target", source, sample), room, rule=config.data.truncate)
            target = side.read("target", source, sample, _only(of_target, used))
        return Rows(
            text, second, target, paired, used, side.labels(source, sample), self._task_of(side, source),
            np.where(used, side.document(source, sample), -1), self._mask_keys(source, example, epoch),
        )  # fmt: skip

    def _mask_keys(self, source: np.ndarray, example: np.ndarray, epoch: np.ndarray | None) -> np.ndarray:
        """What hidden tokens are a function of, uint64 [B]; in validation the same each time."""
        seed = self._config.seed
        if epoch is None:
            return keys_of(seed, _VALIDATION, source, example)
        if self._config.task.masking == "static":
            return keys_of(seed, source, example)
        return keys_of(seed, source, example, epoch)

    def _task_of(self, side: Side, source: np.ndarray) -> np.ndarray:
        if not self._tasks:
            return np.zeros_like(source)
        return np.array([self._tasks[store.task] for store in side.stores])[source]

    def _collate(self, rows: Rows, ids: Sequence[int]) -> Batch:
        """The batch that the task wants of these rows."""
        task, limit = self._config.task, self._config.data.seq_len
        framed = self._frame.join(rows.text, rows.pair, paired=rows.paired, used=rows.used, limit=limit)
        if task.kind == "seq2seq":
            return collate_seq2seq(
                framed, rows.target, start=self._start, end=self._roles.eos, pad=self._frame.pad, limit=limit, sample_ids=ids
            )
        if task.kind == "translation_lm":
            assert self._vocabulary is not None
            return collate_masked(framed, rows.keys, config=task, vocab=self._vocabulary, sample_ids=ids)
        if task.kind == "multi_task":
            return collate_multi(
                framed, rows.labels, rows.task, rows.keys, config=task, vocab=self._vocabulary, types=self._types, sample_ids=ids
            )
        labels = rows.labels if task.kind == "regression" else rows.labels.astype(np.int64)
        document = rows.document if self.train.firsts is not None else None
        return collate_classify(framed, labels=labels, sample_ids=ids, types=self._types, document=document)


def _refuse_rule(data: DataConfig, *, specials: int, single: bool) -> None:
    """Refuse a length or stride that leaves no room for text, and windows of what is not one text."""
    room = data.seq_len - specials
    problems = []
    if room < 1:
        rule = f"must hold {specials} special tokens and one of text"
        problems.append(f"data.seq_len={data.seq_len}: {rule}; nearest: {specials + 1}")
    elif data.truncate == "window" and not single:
        problems.append("data.truncate=window: is for the classification and regression of single texts; nearest: head")
    elif data.truncate == "window" and data.stride >= room:
        near = f"{room // 2}" if room > 1 else f"data.seq_len={2 * data.stride}"
        problems.append(f"data.stride={data.stride}: must be below the {room} text tokens of a window; nearest: {near}")
    elif data.truncate == "window" and data.augment.back_translation:
        problems.append("data.augment.back_translation: does not go with data.truncate=window; nearest: data.truncate=head")
    if problems:
        raise ConfigError(problems)


def _only(what: Kept, rows: np.ndarray) -> Kept:
    """Nothing of the texts that are not among the `rows`, bool [B]."""
    return what if rows.all() else replace(what, length=np.where(rows, what.length, 0))


def _merged(one: Ragged, other: Ragged) -> Ragged:
    """Rows of which each is empty in one of the two."""
    out = Ragged(np.empty(len(one.ids) + len(other.ids), dtype=np.int64), one.lengths + other.lengths)
    for part in (one, other):
        out.ids[out.starts[part.row] + part.column] = part.ids
    return out
