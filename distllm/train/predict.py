"""Predictions for a file, for every kind of task: a file in, a file out, row by row in the same order.

Shapes: N examples, B rows of a batch, C classes, S sequence, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from distllm.config.errors import DataError
from distllm.config.schema import DecodeConfig
from distllm.data.batch import Batch
from distllm.data.chat import prompt_text
from distllm.data.rows import Row
from distllm.data.tokenizer import id_count
from distllm.generate import Sampling, sample_text
from distllm.track.progress import Progress
from distllm.train.ensemble import Ensemble
from distllm.train.example_samples import by_length, head_of, open_examples
from distllm.train.files import Columns, check_output, rows_of, source_of, write_table, write_texts
from distllm.train.translate import encode_texts, translate_ids

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Asked:
    """What to predict from and how; what a task does not need is not read."""

    columns: Columns = field(default_factory=Columns)
    task: str = ""
    """For multi_task: the head."""
    truncate: str | None = None
    """In place of the run's data.truncate."""
    decode: DecodeConfig | None = None
    """For translations, in place of the run's."""
    sampling: Sampling = field(default_factory=lambda: Sampling(64, temperature=0.0))
    """For texts that are continued."""
    seed: int = 1
    batch: int = 32


def predict(ensemble: Ensemble, *, file: Path, output: Path, asked: Asked | None = None, terminal: bool = False) -> int:
    """Answer every row of a file.

    Classes come as a table of the label and the probability of each class, numbers as a table with one column (with commas
    in a .csv file, as objects in a .jsonl file); translations, continuations and texts with their masks filled a line each
    (a .jsonl file keeps their own line breaks).

    Args:
        ensemble: one model or several.
        file: a table (.tsv, .csv, .jsonl, .parquet), or plain text with an example a line.
        output: the file to write; it appears when it is whole.
        asked: what differs from the usual.
        terminal: show progress.

    Returns:
        How many rows there were.

    Raises:
        ConfigError: an option that the task or the file does not have.
        DataError: the file cannot be read, lacks a column, or has a text that is too long.
        StorageError: the output cannot be written.
    """
    asked = asked or Asked()
    check_output(output, inputs=[file])
    first = ensemble.first
    source = source_of(first, file, columns=asked.columns, task=asked.task)
    kind = head_of(first.config, asked.task)
    if kind in ("classification", "regression"):
        with tempfile.TemporaryDirectory(prefix="distllm-") as scratch:
            store, samples = open_examples(first, source, folder=Path(scratch), labelled=False, truncate=asked.truncate)
            with Progress(len(store), terminal=terminal, unit="example") as bar:
                parts = (samples.validation_batch(ids) for ids in _batches(by_length(store, samples), asked.batch))
                answers, numbers = answers_of(ensemble, parts, count=len(store), kind=kind, task=asked.task, advance=bar.advance)
        assert len(numbers) == len(store), "every example is in a batch"
        _write_answers(output, answers, labels=list(first.labels.get(asked.task, ())), kind=kind)
        return len(answers)
    write = {"seq2seq": _translations, "causal_lm": _continuations, "sft": _continuations}.get(kind, _filled)
    # Only the text of a row is read, which for every task lies in `column`.
    rows = list(rows_of(source, kind="seq2seq", cleaning=first.config.data.clean, blank=kind == "causal_lm"))
    with Progress(len(rows), terminal=terminal, unit="row") as bar:
        found: dict[int, str] = {}
        for part in write(ensemble, rows, asked):
            found |= part
            bar.advance(len(found))
    write_texts(output, [found[i] for i in range(len(rows))])
    return len(rows)


def answers_of(
    ensemble: Ensemble, batches: Iterator[Batch], *, count: int, kind: str, task: str = "", advance: Advance | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The probability of each class, or the number, of the examples that are met; windows of one example are averaged.

    Args:
        ensemble: one model or several.
        batches: of examples, or with `document` in their targets of windows.
        count: above the number of any example.
        kind: classification or regression.
        task: of a multi_task model, the head.
        advance: told the number of rows that are done.

    Returns:
        float64 [N, C], or [N, 1] of numbers; and the numbers of the N examples, rising, int64 [N].
    """
    sums, seen = np.zeros((count, 0)), np.zeros(count)
    for batch in batches:
        logits = ensemble.outputs(batch).logits
        rows = np.array(batch.sample_ids)
        if "document" in batch.targets:
            rows = batch.targets["document"].numpy()
        if task:
            logits, rows = logits[task], rows[batch.inputs[f"rows_{task}"].numpy()]
        values = logits.float().reshape(len(rows), -1)
        found = (values if kind == "regression" else values.softmax(-1)).double().cpu().numpy()
        sums = sums if sums.shape[1] else np.zeros((count, found.shape[1]))
        used = rows >= 0
        np.add.at(sums, rows[used], found[used])
        np.add.at(seen, rows[used], 1)
        if advance is not None:
            advance(int((seen > 0).sum()))
    met = np.flatnonzero(seen)
    return sums[met] / seen[met, None], met


def answer_outputs(answers: np.ndarray, *, kind: str) -> SimpleNamespace:
    """Answers [N, C] in the form in which objectives take a model's outputs."""
    values = torch.from_numpy(answers)
    return SimpleNamespace(logits=values if kind == "regression" else values.clamp_min(1e-300).log())


def _batches(order: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield list(order[start : start + size])


def _write_answers(output: Path, answers: np.ndarray, *, labels: list[str], kind: str) -> None:
    if kind == "regression":
        numbers = [float(f"{value:.7g}") for value in answers[:, 0]]
        write_table(output, ["value"], [[n] for n in numbers], objects=[{"value": n} for n in numbers])
        return
    names = labels or [str(i) for i in range(answers.shape[1])]
    best = [names[i] for i in answers.argmax(axis=1)]
    shares = [[float(f"{p:.6g}") for p in row] for row in answers]
    objects = [{"label": b, "probabilities": dict(zip(names, s, strict=True))} for b, s in zip(best, shares, strict=True)]
    write_table(output, ["label", *names], [[b, *s] for b, s in zip(best, shares, strict=True)], objects=objects)


def _translations(ensemble: Ensemble, rows: Sequence[Row], asked: Asked) -> Iterator[dict[int, str]]:
    first = ensemble.first
    ids = encode_texts(
        first, [row.text for row in rows], truncate=asked.truncate or first.config.data.truncate, places=[r.place for r in rows]
    )
    yield from translate_ids(ensemble, ids, decode=asked.decode or first.config.decode, batch=asked.batch)


def _continuations(ensemble: Ensemble, rows: Sequence[Row], asked: Asked) -> Iterator[dict[int, str]]:
    """What follows each text; for sft, what the assistant answers to it."""
    first = ensemble.first
    texts = [row.text for row in rows]
    if first.kind == "sft":
        texts = [prompt_text([{"role": "user", "content": text}], first.tokenizer) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    generator = torch.Generator(first.device).manual_seed(asked.seed)
    for part in _batches(order, asked.batch):
        written = sample_text(
            ensemble.models, tokenizer=first.tokenizer, prompts=[texts[i] for i in part], sampling=asked.sampling,
            max_len=ensemble.max_len, generator=generator, device=first.device, weights=ensemble.weights,
            chat=first.kind == "sft",
        )  # fmt: skip
        if first.kind == "sft":
            written = [text.strip() for text in written]
        yield dict(zip(part, written, strict=True))


def _filled(ensemble: Ensemble, rows: Sequence[Row], asked: Asked) -> Iterator[dict[int, str]]:
    """Each text with its mask tokens replaced by the likeliest tokens; one without stays as it is."""
    first, roles = ensemble.first, ensemble.first.roles
    mask, limit = first.tokenizer.mask_token, ensemble.max_len or first.seq_len
    if roles.mask is None or mask is None:
        raise DataError(f"{first.name}: its tokenizer has no mask token, so there is nothing to fill")
    if not any(mask in row.text for row in rows):
        raise DataError(f"{rows[0].file}: no text has a token to fill; write {mask} where one is wanted")
    head = [] if roles.begin is None else [roles.begin]
    tail = [roles.eos if roles.separator is None else roles.separator]
    every = first.tokenizer([row.text for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
    ids = [[*head, *row, *tail] for row in every]
    pad = roles.eos if roles.pad is None else roles.pad
    for row, some in zip(rows, ids, strict=True):
        if len(some) > limit:
            rule = f"the text takes {len(some)} tokens, special tokens included, and the model takes {limit}"
            raise DataError(f"{row.place}: {rule}; divide it")
    for part in _batches(sorted(range(len(ids)), key=lambda i: len(ids[i])), asked.batch):
        width = max(len(ids[i]) for i in part)
        matrix = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in part])
        seen = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in part])
        own = {f"rows_{name}": torch.arange(len(part) if name == asked.task else 0) for name in first.config.task.tasks}
        answer = ensemble.outputs(Batch({"input_ids": matrix, "attention_mask": seen, **own}, {}, tuple(part))).logits
        logits = (answer[asked.task] if own else answer).cpu()[..., : id_count(first.tokenizer)].clone()
        logits[..., [i for i in (roles.mask, roles.pad, roles.begin) if i is not None]] = -torch.inf
        best = torch.where(matrix == roles.mask, logits.argmax(-1), matrix)
        yield {i: _joined(ensemble, row[len(head) : len(ids[i]) - 1]) for i, row in zip(part, best.tolist(), strict=True)}


def _joined(ensemble: Ensemble, ids: list[int]) -> str:
    return str(ensemble.first.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
