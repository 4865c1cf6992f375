"""Measuring what was trained: on its own validation data, on another file of its kind, or on plain text.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from distllm.config.check import resolve_layout
from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import DataConfig, DecodeConfig, SourceConfig, TokenizerConfig, ValidationConfig
from distllm.data.batch import IGNORE, Batch
from distllm.data.clean import clean, told
from distllm.data.example_store import ExampleStore
from distllm.data.examples import ExampleSamples
from distllm.data.loader import open_samples, validation_batches
from distllm.data.prepare import open_prepared, prepare
from distllm.data.rows import EXAMPLE_TASKS, read_rows
from distllm.data.samples import Samples
from distllm.engine.base import LossTerms
from distllm.evaluate import Evaluation, evaluate
from distllm.metrics.text import bits_per_byte, bleu_from, bleu_statistics, chrf_from, chrf_statistics
from distllm.track.progress import Progress
from distllm.train.ensemble import Ensemble
from distllm.train.example_samples import alone, open_examples
from distllm.train.files import Columns, source_of
from distllm.train.inference import Source
from distllm.train.predict import answer_outputs, answers_of
from distllm.train.tasks import make_task
from distllm.train.translate import plain_text, translate_ids

log = logging.getLogger("distllm")


@dataclass(frozen=True)
class Measured:
    """What was found; figures by the names that `metrics.jsonl` has."""

    source: str
    figures: Mapping[str, float]
    signatures: Mapping[str, str] = field(default_factory=dict)
    """What it takes to compare a figure with others': of BLEU and chrF sacrebleu's."""
    confusions: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of each task that classifies (the only one is named ""): counts [C, C], rows by true class."""
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class On:
    """What to measure on; nothing set: the run's own validation data."""

    texts: tuple[Path, ...] = ()
    """Files of UTF-8 text, each one document, for models of plain text."""
    data: Path | None = None
    """A file like the run's training source."""
    target: Path | None = None
    """For a plain text `data`: the file of its targets."""
    columns: Columns = field(default_factory=Columns)
    task: str = ""
    """For multi_task: the head that `data` is for."""
    truncate: str | None = None
    """In place of the run's data.truncate."""


def measure(
    ensemble: Ensemble, *, on: On | None = None, batch: int = 8, decode: DecodeConfig | None = None, terminal: bool = False
) -> Measured:
    """The figures of a task: loss and what fits it; of an encoder-decoder BLEU and chrF of what it writes too.

    Args:
        ensemble: one model or several, whose probabilities are averaged.
        on: what to measure on.
        batch: samples at once.
        decode: how an encoder-decoder writes; None: as the run's config says.
        terminal: show progress.

    Raises:
        ConfigError: a model without data of its own and nothing given, or data that the task does not take.
        DataError: data that cannot be read, or are empty.
    """
    on, first = on or On(), ensemble.first
    examples = first.kind in EXAMPLE_TASKS
    _check_on(on, first, examples=examples)
    if on.texts and first.kind == "causal_lm":
        return _measure_texts(ensemble, on.texts, batch=batch, terminal=terminal)
    with tempfile.TemporaryDirectory(prefix="distllm-") as scratch:
        if on.data is not None and examples:
            source = source_of(first, on.data, columns=on.columns, task=on.task, target=on.target)
            _, samples = open_examples(first, source, folder=Path(scratch), labelled=True, truncate=on.truncate)
            sources = [source]
        elif on.texts or on.data is not None:
            samples, sources = _packed(first, [*on.texts, *([on.data] if on.data else [])], folder=Path(scratch)), []
        else:
            samples = _own_samples(first)
            sources = list(first.config.data.validation.sources or first.config.data.sources)
        with Progress(samples.validation_size, terminal=terminal, unit="sample") as bar:
            batches = validation_batches(samples, micro_batch=batch, dp_rank=0, dp_size=1, limit=0)
            result = _evaluate(ensemble, _counted(batches, bar), samples)
        figures = dict(result.as_metrics())
        signatures: dict[str, str] = {}
        if first.kind == "seq2seq":
            assert isinstance(samples, ExampleSamples)
            scores, signatures = _written(ensemble, samples, sources, decode=decode, batch=max(batch, 32), terminal=terminal)
            figures |= scores
    return Measured(ensemble.name, figures, signatures, _confusions(result), first.labels)


def _check_on(on: On, first: Source, *, examples: bool) -> None:
    if not on.texts and on.data is None and first.run is None:
        option = "--data FILE" if examples else "--text FILE"
        what = "give a file with labels or targets" if examples else "give a text file"
        raise ConfigError([f"{option[:6]}: {first.name} has no validation data of its own; {what}, {option}"])
    if on.texts and examples:
        raise ConfigError([f"--text={on.texts[0]}: {first.name} is for {first.kind}, which takes examples; nearest: --data"])
    if on.target is not None and (on.data is None or first.kind not in ("seq2seq", "translation_lm")):
        raise ConfigError([f"--target={on.target}: is the second of two text files for seq2seq, --data FILE --target FILE"])


def _counted(batches: Iterator[Batch], bar: Progress) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done += sum(number >= 0 for number in batch.sample_ids)
        bar.advance(done)


def _own_samples(first: Source) -> Samples:
    """The validation samples of a run."""
    config = alone(first.config)
    return open_samples(
        open_prepared(config), config, resolved=resolve_layout(config, 1), tokenizer=first.tokenizer,
        decoder_start=first.decoder_start, token_types=first.token_types,
    )  # fmt: skip


def _packed(first: Source, files: Sequence[Path], *, folder: Path) -> Samples:
    """The samples of plain texts for a model of packed text, tokenised into a folder."""
    sources = [SourceConfig(kind="text", path=str(file)) for file in files]
    own = first.config.data
    data = DataConfig(
        sources=sources, validation=ValidationConfig(sources=sources), seq_len=own.seq_len, store=str(folder), workers=1,
        cross_documents=own.cross_documents, clean=own.clean,
        tokenizer=TokenizerConfig(kind="hf", path=str(first.tokenizer_folder)),
    )  # fmt: skip
    config = alone(first.config).model_copy(update={"data": data})
    return open_samples(
        prepare(config), config, resolved=resolve_layout(config, 1), tokenizer=first.tokenizer, decoder_start=None,
        token_types=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Loss and figures


def _evaluate(ensemble: Ensemble, batches: Iterator[Batch], samples: Samples) -> Evaluation:
    first = ensemble.first
    task = make_task(first.config)
    if isinstance(samples, ExampleSamples) and samples.validation.firsts is not None:
        batches = iter([_whole_documents(ensemble, batches, samples)])
        return evaluate(
            lambda batch: task.objective(answer_outputs(batch.inputs["answers"].numpy(), kind=first.kind), batch), batches,
            figures=task.figures, group=None, device=torch.device("cpu"),
        )  # fmt: skip

    @torch.no_grad()
    def terms(batch: Batch) -> LossTerms:
        return task.objective(ensemble.outputs(batch), batch)

    return evaluate(terms, batches, figures=task.figures, group=None, device=first.device)


def _whole_documents(ensemble: Ensemble, batches: Iterator[Batch], samples: ExampleSamples) -> Batch:
    """One batch of all examples, whose `answers` are the means over their windows."""
    kind, count = ensemble.first.kind, sum(len(store) for store in samples.validation.stores)
    labels = torch.zeros(count, dtype=torch.int64 if kind == "classification" else torch.float32)

    def noted() -> Iterator[Batch]:
        for batch in batches:
            used = torch.tensor(batch.sample_ids) >= 0
            labels[batch.targets["document"][used]] = batch.targets["labels"][used]
            yield batch

    answers, numbers = answers_of(ensemble, noted(), count=count, kind=kind)
    targets = {"labels": labels[torch.from_numpy(numbers)]}
    if kind == "regression":
        targets["weight"] = torch.ones(len(numbers))
    return Batch({"answers": torch.from_numpy(answers)}, targets, tuple(numbers.tolist()))


def _confusions(result: Evaluation) -> dict[str, np.ndarray]:
    """The confusion matrices among the sums, by task; not of one of several tasks that had no sample."""
    found = [name.rpartition("confusion") for name in result.parts if name == "confusion" or name.endswith(".confusion")]
    every = {task.removesuffix("."): result.parts[task + what].numpy().round().astype(np.int64) for task, what, _ in found}
    return {task: counts for task, counts in every.items() if counts.any()}


# ---------------------------------------------------------------------------------------------------------------------
# What an encoder-decoder writes


def _written(
    ensemble: Ensemble, samples: ExampleSamples, sources: Sequence[SourceConfig], *, decode: DecodeConfig | None, batch: int,
    terminal: bool,
) -> tuple[dict[str, float], dict[str, str]]:
    """BLEU and chrF of the translations of all validation examples, and sacrebleu's signatures."""  # fmt: skip
    side, first = samples.validation, ensemble.first
    inputs: list[list[int]] = []
    for piece in validation_batches(samples, micro_batch=batch, dp_rank=0, dp_size=1, limit=0):
        rows = zip(piece.sample_ids, piece.inputs["input_ids"], piece.inputs["attention_mask"].bool(), strict=True)
        inputs += [ids[seen].tolist() for number, ids, seen in rows if number >= 0]
    references: list[str] = []
    cleaning, changed = first.config.data.clean, 0
    for k, store in enumerate(side.stores):
        texts = _targets(sources[k], store)
        for example in side.examples[k].tolist():
            references.append(texts[example] if texts is not None else plain_text(first, store.ids("target", example).tolist()))
            changed += texts is not None and clean(texts[example], cleaning) != texts[example]
    found: dict[int, str] = {}
    with Progress(len(references), terminal=terminal, unit="translation") as bar:
        for part in translate_ids(ensemble, inputs, decode=decode or first.config.decode, batch=batch):
            found |= part
            bar.advance(len(found))
    if changed:
        rule = "so the model writes what cannot match them wholly, and BLEU and chrF are lower"
        share = f"{changed} of {len(references)} references"
        log.warning("%s are not as data.clean (%s) makes them, %s", share, told(cleaning), rule)
    hypotheses = [found[i] for i in range(len(references))]
    bleu, bleu_signature = bleu_from(bleu_statistics(hypotheses, references))
    chrf, chrf_signature = chrf_from(chrf_statistics(hypotheses, references))
    return {"val_bleu": bleu, "val_chrf": chrf}, {"val_bleu": bleu_signature, "val_chrf": chrf_signature}


def _targets(source: SourceConfig, store: ExampleStore) -> list[str] | None:
    """The targets of a source as they were written; None where the store is not the whole file, as repeats were dropped."""
    try:
        rows = [row.target or "" for row in read_rows(source, kind="seq2seq")]
    except DataError:  # the file of a run may be gone: its tokens are there
        return None
    return rows if len(rows) == len(store) else None


# ---------------------------------------------------------------------------------------------------------------------
# Plain text for causal language models


def _measure_texts(ensemble: Ensemble, files: Sequence[Path], *, batch: int, terminal: bool) -> Measured:
    """Loss and bits per byte of texts, each one document, cut into windows that do not overlap.

    They are cleaned as those of the training, and the bytes are those of what is left.
    """
    first = ensemble.first
    texts = [clean(_read_text(path), first.config.data.clean) for path in files]
    rows = [row for text in texts for row in _windows(first, text)]
    task = make_task(first.config)

    @torch.no_grad()
    def terms(piece: Batch) -> LossTerms:
        return task.objective(ensemble.outputs(piece), piece)

    with Progress(len(rows), terminal=terminal, unit="window") as bar:
        batches = _counted(_stacked(rows, batch), bar)
        result = evaluate(terms, batches, figures=task.figures, group=None, device=first.device)
    size = sum(len(text.encode()) for text in texts)
    figures = {**result.as_metrics(), "bits_per_byte": bits_per_byte(result.loss * result.count, size)}
    return Measured(ensemble.name, figures)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text") from None


def _windows(source: Source, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and labels of a text, seq_len at a time, every token predicted once but the very first."""
    ids: list[int] = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(0, len(ids) - 1, source.seq_len):
        inputs = ids[start : start + source.seq_len]
        labels = ids[start + 1 : start + source.seq_len + 1]
        padding = source.seq_len - len(labels)
        yield inputs[: len(labels)] + [0] * padding, labels + [IGNORE] * padding


def _stacked(rows: Sequence[tuple[list[int], list[int]]], size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        inputs, labels = torch.tensor([r[0] for r in part]), torch.tensor([r[1] for r in part])
        yield Batch({"input_ids": inputs}, {"labels": labels}, tuple(range(start, start + len(part))))
