"""Samples of packed text: for the next token, or for hidden ones.

Shapes: B samples, S tokens of a sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

import numpy as np
import torch

from distllm.config.check import Resolved, resolve_layout
from distllm.config.errors import DataError
from distllm.config.schema import Config, TaskConfig
from distllm.data.batch import Batch
from distllm.data.collate import collate, part_of
from distllm.data.masking import MaskVocabulary, mask_rows
from distllm.data.order import Order, key_of, mix, proportions
from distllm.data.prepare import Prepared
from distllm.data.ramp import ramped, ramped_length
from distllm.data.samples import StepPlan
from distllm.data.store import TokenStore
from distllm.data.stream import Stream, split_by_document, split_by_position, whole

COUNTED = 1 << 27  # tokens from which unigram frequencies are taken: all of a smaller text, 1 s
COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Masking:
    """What hiding tokens needs to know."""

    task: TaskConfig
    vocabulary: MaskVocabulary
    begin: int | None
    """The token that every sample begins with, which a classifier reads later; None: the tokenizer has none."""
    pad: int


class PackedText:
    """The samples of prepared text, cut from one long row of tokens.

    Sample k of a source is the tokens [k S, k S + S] of its stream: S inputs, and one more for the last label; with hidden
    tokens it is a begin token and the S - 1 tokens from k (S - 1) on. Validation windows lie one after another in the same
    way, and the last one is padded.
    """

    def __init__(
        self, prepared: Prepared, config: Config, *, resolved: Resolved | None = None, masking: Masking | None = None
    ) -> None:
        """Open the streams.

        Args:
            prepared: the tokens.
            config: `data`, `task` and the ramps of `train` are read.
            resolved: the batch; None: one micro-batch a step.
            masking: hide tokens instead of asking for the next one.

        Raises:
            DataError: a training text is shorter than a sample, or there is no validation text.
        """
        self.seq_len = config.data.seq_len
        self.vocab_size = prepared.vocab_size
        self.cross_documents = config.data.cross_documents
        self.resolved = resolved or resolve_layout(config, 1)
        self._ramps = config.train
        self._masking = masking
        self._next = 0 if masking else 1
        self._stride = self.seq_len - (1 if masking and masking.begin is not None else 0)
        self.train, self.validation = _streams(prepared, config)
        _refuse_short(self.train, self.validation, config)
        self.order = Order(
            tuple((s.n_tokens - self._next) // self._stride for s in self.train),
            tuple(s.weight for s in config.data.sources),
            config.seed,
            config.data.shuffle,
        )
        windows = [max(0, -(-(s.n_tokens - self._next) // self._stride)) for s in self.validation]
        self._window_ends = np.cumsum(windows)

    @property
    def train_size(self) -> int:
        """Samples of an epoch, all sources together."""
        return sum(self.order.sizes)

    @property
    def validation_size(self) -> int:
        """Validation windows."""
        return int(self._window_ends[-1])

    def step(self, start: int) -> StepPlan:
        """The step that begins with the global sample number `start`."""
        plan = ramped(start, resolved=self.resolved, samples=self._ramps.batch_ramp)
        length = ramped_length(
            start, samples=self._ramps.seq_ramp, first=self._ramps.seq_ramp_from, last=self.seq_len
        )
        return plan if length == self.seq_len else replace(plan, seq_len=length)

    def tokens(self, samples: range) -> int:
        """Input tokens of these training samples."""
        return len(samples) * self.seq_len

    def batch_bytes(self, size: int) -> int:
        """About how much memory a batch of `size` samples takes, in bytes."""
        inside = 0 if self.cross_documents else self.seq_len + 8  # the mask [S, S] and the positions
        return size * self.seq_len * (16 + inside)

    def train_batch(self, ids: Sequence[int]) -> Batch:
        """The training samples with these global numbers."""
        return self.train_batches([ids])[0]

    def train_batches(self, ids: Sequence[Sequence[int]]) -> list[Batch]:
        """`train_batch` for several batches at once, which costs a tenth of one after another when batches are small."""
        every = list(chain.from_iterable(ids))
        numbers = np.array(every, dtype=np.int64)
        source, sample = self.order.locate(numbers)
        rows, begins = self._rows(self.train, source, sample)
        if self._masking is None:
            whole = collate(rows, sample_ids=every, begins=begins)
        else:
            same = self._masking.task.masking == "static"
            keys = _keys(self.order.seed, sample if same else numbers, source if same else -1)
            whole = self._hidden(rows, keys, sample_ids=every)
        cuts = list(accumulate((len(batch) for batch in ids), initial=0))
        return [part_of(whole, first, last) for first, last in pairwise(cuts)]

    def validation_batch(self, ids: Sequence[int]) -> Batch:
        """The validation windows with these numbers; -1 is a row of padding."""
        number = np.array(ids, dtype=np.int64)
        source = np.searchsorted(self._window_ends, number, side="right")
        window = np.maximum(number - np.concatenate([[0], self._window_ends])[source], 0)
        rows, begins = self._rows(self.validation, source, window)
        left = np.array([s.n_tokens - self._next for s in self.validation])[source] - window * self._stride
        labelled = np.where(number < 0, 0, np.minimum(left, self._stride))
        rows[number < 0] = 0
        if self._masking is None:
            return collate(rows, sample_ids=ids, begins=begins, labelled=labelled)
        return self._hidden(rows, _keys(self.order.seed, window, -2 - source), sample_ids=ids, filled=labelled)

    def _hidden(
        self, rows: np.ndarray, keys: np.ndarray, *, sample_ids: Sequence[int], filled: np.ndarray | None = None
    ) -> Batch:
        """A batch with hidden tokens; of each row the first `filled` tokens are text, the rest is padding."""
        masking = self._masking
        assert masking is not None
        may = np.ones(rows.shape, dtype=bool) if filled is None else np.arange(rows.shape[1]) < filled[:, None]
        rows = np.where(may, rows, masking.pad)
        if masking.begin is not None:
            rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=masking.begin)
            may = np.pad(may, ((0, 0), (1, 0)))
        inputs, labels = mask_rows(rows, keys, config=masking.task, vocab=masking.vocabulary, may=may)
        given = {"input_ids": torch.from_numpy(inputs)}
        if filled is not None:  # the first token is looked at also in a row of padding: a mask of zeros alone gives no number
            seen = may.copy()
            seen[:, 0] = True
            given["attention_mask"] = torch.from_numpy(seen.astype(np.int64))
        return Batch(given, {"labels": torch.from_numpy(labels)}, tuple(sample_ids))

    def _rows(self, streams: Sequence[Stream], source: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        length = self._stride + self._next
        if len(streams) == 1 and self.cross_documents:
            return streams[0].rows(sample * self._stride, length), None
        rows = np.empty((len(sample), length), dtype=np.int64)
        begins = None if self.cross_documents else np.empty(rows.shape, dtype=bool)
        for k, stream in enumerate(streams):
            mine = np.flatnonzero(source == k)
            if len(mine):
                rows[mine] = stream.rows(sample[mine] * self._stride, length)
                if begins is not None:
                    begins[mine] = stream.begins(sample[mine] * self._stride, length)
        return rows, begins

    def unigram_loss(self) -> float:
        """The loss, in nats a token, of always predicting the frequencies of the training tokens on the validation labels.

        Frequencies are add-one-smoothed and, with several sources, mixed by their weights. Of more than 1.3 * 10^8 tokens
        evenly spaced pieces are counted.
        """
        model = np.zeros(self.vocab_size)
        for share, stream in zip(proportions(self.order.weights), self.train, strict=True):
            counts = _counts(stream, self.vocab_size, labels=False, across=True)
            model += share * (counts + 1) / (counts.sum() + self.vocab_size)
        counts = sum(
            (_counts(s, self.vocab_size, labels=True, across=self.cross_documents) for s in self.validation),
            np.zeros(self.vocab_size),
        )
        return float(-(counts * np.log(model)).sum() / counts.sum())


def _keys(seed: int, number: np.ndarray, source: np.ndarray | int) -> np.ndarray:
    """A key for each sample, uint64 [B], from which its hidden tokens are drawn."""
    sources = np.broadcast_to(source, number.shape).astype(np.int64).astype(np.uint64)
    return mix(mix(number.astype(np.uint64)) ^ mix(sources) ^ np.uint64(key_of(seed, -3)))


def _streams(prepared: Prepared, config: Config) -> tuple[list[Stream], list[Stream]]:
    """The train and validation streams; a separate validation source leaves the training sources whole."""
    if prepared.validation_stores:
        return [whole(s) for s in prepared.stores], [whole(s) for s in prepared.validation_stores]
    held = config.data.validation

    def split(store: TokenStore, k: int) -> tuple[Stream, Stream]:
        if held.by == "position":
            return split_by_position(store, fraction=held.fraction)
        return split_by_document(store, fraction=held.fraction, seed=key_of(config.seed, k))

    pairs = [split(store, k) for k, store in enumerate(prepared.stores)]
    return [train for train, _ in pairs], [validation for _, validation in pairs]


def _refuse_short(train: Sequence[Stream], validation: Sequence[Stream], config: Config) -> None:
    """Refuse texts that give no sample, naming the nearest setting that works."""
    length, held = config.data.seq_len, config.data.validation
    documents, tokens = (sum(getattr(s.store, what) for s in train) for what in ("n_documents", "n_tokens"))
    if not held.sources and held.by == "document" and 0 < held.fraction < 1 and documents == 1:
        rule = "the text is one document and cannot be divided; use data.validation.by=position"
        raise DataError(f"data.validation.by=document: {rule}")
    for k, n in enumerate(s.n_tokens for s in train):
        if n < length + 1:
            longest = f"the longest that works is data.seq_len={n - 1}"
            near = longest if n > 1 else f"lower data.validation.fraction={held.fraction} to 0.05, or give more text"
            rule = f"a sample and its last label take {length + 1} tokens, but the training part of source {k} has {n}"
            raise DataError(f"data.seq_len={length}: {rule}; {near}")
    if not any(s.n_tokens > 1 for s in validation):
        # A share that holds at least one document, or two tokens: the label needs the token before it.
        share = 1 / documents if held.by == "document" else 3 / tokens
        near = "give more text" if held.sources else f"{float(f'{min(0.5, max(share * 1.5, 0.0001)):.1g}')} works"
        what = "data.validation.sources" if held.sources else f"data.validation.fraction={held.fraction}"
        raise DataError(f"{what}: no validation text to evaluate on; {near}")


def _counts(stream: Stream, vocab_size: int, *, labels: bool, across: bool) -> np.ndarray:
    """How often each id comes in a stream, float64 [V]; for labels without those that no label is made of."""
    counts = np.zeros(vocab_size)
    blocks = np.arange(0, stream.n_tokens, COUNTED_AT_ONCE)
    if stream.n_tokens > COUNTED:
        blocks = blocks[np.linspace(0, len(blocks) - 1, COUNTED // COUNTED_AT_ONCE).astype(np.int64)]
    for position in blocks.tolist():
        at, n = np.array([position]), min(COUNTED_AT_ONCE, stream.n_tokens - position)
        keep = np.ones(n, dtype=bool)
        if labels:
            keep[0] = position > 0
            if not across:
                keep &= ~stream.begins(at, n)[0]
        counts += np.bincount(stream.rows(at, n)[0][keep], minlength=vocab_size)
    return counts
