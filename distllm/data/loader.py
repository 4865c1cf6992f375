"""Samples by number, and the batches of a rank.

The i-th sample is a pure function of (seed, i); a rank takes its slice of them, and nothing else decides what it gets.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from itertools import accumulate, chain, count, pairwise

import numpy as np

from distllm.config.errors import DataError
from distllm.config.schema import Config
from distllm.data.batch import Batch
from distllm.data.collate import collate, part_of, pinned
from distllm.data.order import Order, key_of, proportions
from distllm.data.prepare import Prepared
from distllm.data.store import TokenStore
from distllm.data.stream import Stream, split_by_document, split_by_position, whole

COUNTED = 1 << 27  # tokens from which unigram frequencies are taken: all of a smaller text, 1 s
COUNTED_AT_ONCE = 1 << 20
AHEAD_BYTES = 256 << 20  # of batches that wait for their step


class Samples:
    """The samples of prepared data, by number.

    A training sample k of a source is the tokens [k S, k S + S] of its stream: S inputs, and one more for the last label.
    The validation windows lie one after another in the same way, and the last one is padded.
    """

    def __init__(self, prepared: Prepared, config: Config) -> None:
        """Open the streams.

        Raises:
            DataError: a training text is shorter than a sample, or there is no validation text.
        """
        self.seq_len = config.data.seq_len
        self.vocab_size = prepared.vocab_size
        self.cross_documents = config.data.cross_documents
        self.train, self.validation = _streams(prepared, config)
        _refuse_short(self.train, self.validation, config)
        self.order = Order(
            tuple((s.n_tokens - 1) // self.seq_len for s in self.train),
            tuple(s.weight for s in config.data.sources),
            config.seed,
            config.data.shuffle,
        )
        windows = [max(0, -(-(s.n_tokens - 1) // self.seq_len)) for s in self.validation]
        self._window_ends = np.cumsum(windows)

    @property
    def train_size(self) -> int:
        """Samples of an epoch, all sources together."""
        return sum(self.order.sizes)

    @property
    def validation_size(self) -> int:
        """Validation windows."""
        return int(self._window_ends[-1])

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
        source, sample = self.order.locate(np.array(every, dtype=np.int64))
        rows, begins = self._rows(self.train, source, sample)
        whole = collate(rows, sample_ids=every, begins=begins)
        cuts = list(accumulate((len(batch) for batch in ids), initial=0))
        return [part_of(whole, first, last) for first, last in pairwise(cuts)]

    def validation_batch(self, ids: Sequence[int]) -> Batch:
        """The validation windows with these numbers; -1 is a row of padding."""
        number = np.array(ids, dtype=np.int64)
        source = np.searchsorted(self._window_ends, number, side="right")
        window = np.maximum(number - np.concatenate([[0], self._window_ends])[source], 0)
        rows, begins = self._rows(self.validation, source, window)
        left = np.array([s.n_tokens - 1 for s in self.validation])[source] - window * self.seq_len
        labelled = np.where(number < 0, 0, np.minimum(left, self.seq_len))
        rows[number < 0] = 0
        return collate(rows, sample_ids=ids, begins=begins, labelled=labelled)

    def _rows(self, streams: Sequence[Stream], source: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        length = self.seq_len + 1
        if len(streams) == 1 and self.cross_documents:
            return streams[0].rows(sample * self.seq_len, length), None
        rows = np.empty((len(sample), length), dtype=np.int64)
        begins = None if self.cross_documents else np.empty(rows.shape, dtype=bool)
        for k, stream in enumerate(streams):
            mine = np.flatnonzero(source == k)
            if len(mine):
                rows[mine] = stream.rows(sample[mine] * self.seq_len, length)
                if begins is not None:
                    begins[mine] = stream.begins(sample[mine] * self.seq_len, length)
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


def step_batches(
    samples: Samples, *, start: int, micro_batch: int, accumulation: int, dp_rank: int, dp_size: int, prefetch: int, pin: bool
) -> Generator[list[Batch]]:
    """The micro-batches of this rank, a step after another, without end; a background thread makes them ahead.

    Args:
        samples: where they come from.
        start: the global number of the first sample: how many were consumed.
        micro_batch: samples of one batch.
        accumulation: micro-batches of a step.
        dp_rank: this rank among the `dp_size` data-parallel ones. Micro-batch a holds the samples
            start + (a * dp_size + dp_rank) * micro_batch + [0, micro_batch).
        prefetch: steps made ahead, fewer where they are larger than AHEAD_BYTES together.
        pin: put the batches into page-locked memory.

    Raises:
        Whatever the thread met, when its step is asked for. Closing the iterator ends the thread.
    """
    ahead = max(1, min(prefetch, AHEAD_BYTES // samples.batch_bytes(micro_batch * accumulation)))
    at_once = max(1, ahead // 2)
    chunks = _chunks(
        samples, start=start, micro_batch=micro_batch, accumulation=accumulation, dp_rank=dp_rank, dp_size=dp_size,
        at_once=at_once, pin=pin,
    )  # fmt: skip
    # Two queues in C, of chunks and of free places, because a bounded queue.Queue takes a lock that both sides want. Whole
    # chunks of steps: the training thread loses the interpreter to this one once a chunk and not once a step.
    ready: queue.SimpleQueue[list[list[Batch]] | BaseException] = queue.SimpleQueue()
    room: queue.SimpleQueue[bool] = queue.SimpleQueue()
    for _ in range(ahead // at_once):
        room.put(True)

    def work() -> None:
        try:
            while room.get():
                ready.put(next(chunks))
        except BaseException as error:
            ready.put(error)

    def end() -> None:
        stop = room  # a thread that waits for room sees the end; one that is at work sees it next
        with contextlib.suppress(queue.Empty):
            while True:
                stop.get_nowait()
        stop.put(False)
        thread.join(timeout=10.0)  # a file system that hangs does not hold the process

    thread = threading.Thread(target=work, name="distllm-data", daemon=True)
    thread.start()
    # An iterator that nobody closes: a daemon thread inside torch while the interpreter ends aborts the process.
    atexit.register(end)
    try:
        while True:
            chunk = ready.get()
            if isinstance(chunk, BaseException):
                raise chunk
            room.put(True)
            yield from chunk
    finally:
        end()
        atexit.unregister(end)


def _chunks(
    samples: Samples, *, start: int, micro_batch: int, accumulation: int, dp_rank: int, dp_size: int, at_once: int, pin: bool
) -> Iterator[list[list[Batch]]]:
    """The micro-batches of `at_once` steps after another, without end; arguments as in `step_batches`."""
    for first in count(start, at_once * accumulation * dp_size * micro_batch):
        begins = [first + (n * dp_size + dp_rank) * micro_batch for n in range(at_once * accumulation)]
        batches = samples.train_batches([range(at, at + micro_batch) for at in begins])
        batches = [pinned(batch) for batch in batches] if pin else batches
        yield [batches[n : n + accumulation] for n in range(0, len(batches), accumulation)]


def validation_batches(samples: Samples, *, micro_batch: int, dp_rank: int, dp_size: int, limit: int) -> Iterator[Batch]:
    """The validation windows of this rank: each window on one rank, and the same number of batches on every rank.

    Args:
        samples: where they come from.
        micro_batch: windows of a batch.
        dp_rank: this rank among the `dp_size` data-parallel ones.
        limit: batches of a rank; 0 takes all windows, fewer are spread evenly over all.
    """
    size, group = samples.validation_size, micro_batch * dp_size
    steps = -(-size // group)
    if limit and limit < steps:
        steps, chosen = limit, limit * group
    else:
        chosen = size
    for step in range(steps):
        first = step * group + dp_rank * micro_batch
        yield samples.validation_batch([i * size // chosen if i < chosen else -1 for i in range(first, first + micro_batch)])
