"""The batches of a rank, a step after another.

A rank takes its slice of the samples of a step, and nothing else decides what it gets.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from distllm.config.check import Resolved
from distllm.config.schema import Config
from distllm.data.augment import make_augmenter
from distllm.data.batch import Batch
from distllm.data.collate import pinned
from distllm.data.examples import ExampleSamples
from distllm.data.masking import MaskVocabulary
from distllm.data.pack import PackedExamples
from distllm.data.packed_text import Masking, PackedText
from distllm.data.prepare import Prepared
from distllm.data.ramp import cut_rows
from distllm.data.samples import Samples, StepPlan
from distllm.data.tokenizer import roles_of

AHEAD_BYTES = 256 << 20  # of batches that wait for their step


@dataclass(frozen=True)
class Step:
    """What one rank needs for one step."""

    samples: range
    """The global numbers of the samples of the whole step, all ranks together."""
    tokens: int
    """Input tokens of the whole step, without padding."""
    microbatches: list[Batch]
    """This rank's."""


def open_samples(
    prepared: Prepared,
    config: Config,
    *,
    resolved: Resolved,
    tokenizer: Any,
    decoder_start: int | None,
    token_types: bool,
) -> Samples:
    """The samples of the config's task.

    Args:
        prepared: what `prepare` made for this config.
        config: `task`, `data` and the batch of `train` are read.
        resolved: the batch.
        tokenizer: of transformers, the one that `prepared` was made with.
        decoder_start: the token that an encoder-decoder's target begins with.
        token_types: whether the model wants to be told which of two texts a token is of.

    Raises:
        DataError: too little text, or a text that is longer than may be.
    """
    kind = config.task.kind
    if kind == "causal_lm":
        return PackedText(prepared, config, resolved=resolved)
    roles = roles_of(tokenizer)
    if kind == "masked_lm":
        pad = roles.eos if roles.pad is None else roles.pad
        masking = Masking(config.task, MaskVocabulary.of(tokenizer), roles.begin, pad)
        return PackedText(prepared, config, resolved=resolved, masking=masking)
    if kind == "sft":
        return PackedExamples(prepared, config, resolved=resolved, roles=roles)
    hides = kind == "translation_lm" or any(head.kind == "masked_lm" for head in config.task.tasks.values())
    return ExampleSamples(
        prepared, config, resolved=resolved, roles=roles, takes_token_types=token_types, decoder_start=decoder_start,
        vocabulary=MaskVocabulary.of(tokenizer) if hides else None,
        augmenter=make_augmenter(config.data.augment, tokenizer),
    )  # fmt: skip


def step_batches(
    samples: Samples, *, start: int, dp_rank: int, dp_size: int, prefetch: int, pin: bool
) -> Generator[Step]:
    """This rank's micro-batches, a step after another, without end; a background thread makes them ahead.

    Args:
        samples: where they come from, and which of them a step takes.
        start: the global number of the first sample: how many were consumed.
        dp_rank: this rank among the `dp_size` data-parallel ones.
        dp_size: how many read different samples.
        prefetch: steps made ahead, fewer where they are larger than AHEAD_BYTES together.
        pin: put the batches into page-locked memory.

    Raises:
        Whatever the thread met, when its step is asked for. Closing the iterator ends the thread.
    """
    first = samples.step(start)
    ahead = max(1, min(prefetch, AHEAD_BYTES // samples.batch_bytes(first.micro_batch * first.accumulation)))
    at_once = max(1, ahead // 2)
    chunks = _chunks(samples, start=start, dp_rank=dp_rank, dp_size=dp_size, at_once=at_once, pin=pin)
    # Two queues in C, of chunks and of free places, because a bounded queue.Queue takes a lock that both sides want. Whole
    # chunks of steps: the training thread loses the interpreter to this one once a chunk and not once a step.
    ready: queue.SimpleQueue[list[Step] | BaseException] = queue.SimpleQueue()
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
    samples: Samples, *, start: int, dp_rank: int, dp_size: int, at_once: int, pin: bool
) -> Iterator[list[Step]]:
    """The micro-batches of `at_once` steps after another, without end; arguments as in `step_batches`."""
    while True:
        plans: list[StepPlan] = []
        for _ in range(at_once):
            plans.append(samples.step(start))
            start = plans[-1].samples.stop
        rows = [row for plan in plans for row in _dealt(plan, dp_rank=dp_rank, dp_size=dp_size)]
        made = iter(samples.train_batches(rows))
        steps = []
        for plan in plans:
            batches = [next(made) for _ in range(plan.accumulation)]
            if plan.seq_len is not None:
                batches = [cut_rows(batch, plan.seq_len) for batch in batches]
            batches = [pinned(batch) for batch in batches] if pin else batches
            steps.append(Step(plan.samples, samples.tokens(plan.samples), batches))
        yield steps


def _dealt(plan: StepPlan, *, dp_rank: int, dp_size: int) -> Iterator[list[int]]:
    """The global sample numbers of this rank's micro-batches; -1 for a row of padding."""
    size, end = plan.micro_batch, plan.samples.stop
    for a in range(plan.accumulation):
        first = plan.samples.start + (a * dp_size + dp_rank) * size
        yield [i if i < end else -1 for i in range(first, first + size)]


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
