"""Samples of a trained model's own task from any file of examples, for one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distllm.config.check import resolve_layout
from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import AugmentConfig, Config, LayoutConfig, SourceConfig, TrainConfig, ValidationConfig
from distllm.data.example_store import ExampleStore
from distllm.data.loader import open_samples
from distllm.data.prepare import Prepared
from distllm.data.prepare_examples import encode_source
from distllm.data.samples import Samples
from distllm.data.tokenizer import id_count
from distllm.train.files import rows_of
from distllm.train.inference import Source


def head_of(config: Config, task: str) -> str:
    """The kind of a task: of a multi_task config that of one of its heads."""
    return config.task.tasks[task].kind if config.task.kind == "multi_task" else config.task.kind


def alone(config: Config) -> Config:
    """The config for one process, without what is of use in training only."""
    return config.model_copy(update={"layout": LayoutConfig(), "train": TrainConfig()})


def open_examples(
    opened: Source, source: SourceConfig, *, folder: Path, labelled: bool, truncate: str | None
) -> tuple[ExampleStore, Samples]:
    """The examples of a file, tokenised, and as validation samples.

    Args:
        opened: the model.
        source: from `files.source_of`; of a multi_task model for the head that it names.
        folder: as in `encode_file`.
        labelled: as in `encode_file`.
        truncate: as in `samples_of`.

    Raises:
        ConfigError: the rule does not go with the task.
        DataError: a row is wrong, has a label that training does not know, or is too long.
    """
    kind = head_of(opened.config, source.task or "")
    store = encode_file(opened, source, kind=kind, folder=folder, labelled=labelled)
    return store, samples_of(opened, store, source, truncate=truncate)


def encode_file(opened: Source, source: SourceConfig, *, kind: str, folder: Path, labelled: bool) -> ExampleStore:
    """Tokenise the examples of a file.

    Args:
        opened: the model.
        source: from `files.source_of`.
        kind: of the task that they are for.
        folder: where to write; the store reads from it as long as it is used.
        labelled: whether labels and targets are read too.

    Raises:
        DataError: a row is wrong, or has a label that training does not know.
    """
    if source.kind == "text" and labelled:
        hint = "give a .tsv, .csv or .jsonl file" if kind != "seq2seq" else "give its targets with --target FILE"
        raise DataError(f"{source.path}: a plain text has no labels and no targets; {hint}")
    if source.kind == "text":
        lines = folder / "lines.jsonl"
        with lines.open("w", encoding="utf-8") as file:
            plain = source.model_copy(update={"prefix": ""})  # which is not cleaned
            file.writelines(json.dumps({"text": row.text}) + "\n" for row in rows_of(plain, kind=kind))
        source = SourceConfig(kind="jsonl", path=str(lines), task=source.task, prefix=source.prefix)
    return encode_source(
        source, opened.config, tokenizer_folder=opened.tokenizer_folder, labels=opened.labels, folder=folder / "examples",
        labelled=labelled,
    )  # fmt: skip


def samples_of(opened: Source, store: ExampleStore, source: SourceConfig, *, truncate: str | None) -> Samples:
    """The examples of a store as validation samples.

    Args:
        opened: the model.
        store: from `encode_file`.
        source: what it was made of.
        truncate: in place of the run's data.truncate; None: that.

    Raises:
        ConfigError: the rule does not go with the task.
        DataError: an example is too long.
    """
    _check_truncate(truncate)
    own = opened.config.data
    plain = {"sources": [source], "validation": ValidationConfig(), "augment": AugmentConfig()}
    data = own.model_copy(update={**plain, "truncate": truncate or own.truncate})
    config = alone(opened.config).model_copy(update={"data": data})
    prepared = Prepared((), (), opened.tokenizer_folder, id_count(opened.tokenizer), "", (store,), (store,), opened.labels)
    try:
        return open_samples(
            prepared, config, resolved=resolve_layout(config, 1), tokenizer=opened.tokenizer, decoder_start=opened.decoder_start,
            token_types=opened.token_types,
        )  # fmt: skip
    except DataError as error:
        raise DataError(_here(str(error), source)) from None
    except ConfigError as error:
        raise ConfigError([_here(problem, source) for problem in error.problems]) from None


def _here(problem: str, source: SourceConfig) -> str:
    """A problem of samples in the words of the command line."""
    return problem.replace("data.sources.0", str(source.path)).replace("data.truncate", "--truncate")


def by_length(store: ExampleStore, samples: Samples) -> Sequence[int]:
    """The validation samples in an order in which neighbours are about equally long, the longest first: so little is padded."""
    if samples.validation_size != len(store):  # windows: all but the last of each text have one length
        return range(samples.validation_size)
    lengths = sum((store.lengths(field) for field in store.fields if field != "target"), np.zeros(len(store), dtype=np.int64))
    return list(np.argsort(-lengths, kind="stable").tolist())


def _check_truncate(rule: str | None) -> None:
    """Refuse a rule that data.truncate does not have."""
    rules = ("refuse", "head", "tail", "middle", "window")
    if rule is not None and rule not in rules:
        raise ConfigError([f"--truncate={rule}: must be one of {', '.join(rules)}; nearest: head"])
