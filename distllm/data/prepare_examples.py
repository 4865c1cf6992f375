"""Examples (labelled texts, pairs, translations, chats) to ExampleStores: the part of a preparation that is not packed text.

A source's stores lie in a folder NAME of the prepared folder: `text.bin`, `text.idx`, and as the task has them `pair`, `target`,
`flags`, `back` likewise, and `labels.npy`. The rows are read several times, never held: once to check them, find the labels and
the repeats, once for the tokenizer to learn from, once to tokenise.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer

from distllm.config.errors import DataError
from distllm.config.schema import Config, SourceConfig
from distllm.data.bar import Bar
from distllm.data.chat import load_chat_encoder, messages_of
from distllm.data.encode import agrees_on, load_encoder
from distllm.data.example_store import ExampleStore
from distllm.data.rows import EXAMPLE_TASKS, TABLES, Row, fingerprint, read_rows, task_kind
from distllm.data.store import DTYPES, TokenStore, bin_path, dtype_for, idx_path, write_index
from distllm.data.survey import LABELLED, Labels, Named, Survey, class_of, kept_rows, task_name
from distllm.data.tokenizer import id_count

FORMAT = 1  # raise it when the same text would give other bytes
BATCH = 1000  # rows tokenised at once
TRANSLATED_AT_ONCE = 256
Translate = Callable[[list[str]], list[str]]


def is_examples(config: Config) -> bool:
    """Whether the task is learned from examples, not from packed text."""
    return config.task.kind in EXAMPLE_TASKS


def augments(config: Config) -> bool:
    """Whether the training examples come with a back-translation."""
    fits = config.task.kind in (*LABELLED, "seq2seq", "multi_task")
    return fits and config.data.augment.back_translation > 0


def content_facts(config: Config, named: Named) -> dict[str, Any]:
    """What decides the bytes of the example stores, besides tokenizer, cleaning and dedup: for the digest of a prepared folder.

    Raises:
        DataError: a source is not there or is empty.
    """
    task, data = config.task, config.data
    facts: dict[str, Any] = {"examples": FORMAT, "kind": task.kind, "labels": task.labels, "sources": []}
    facts["tasks"] = [(name, head.kind, head.labels) for name, head in task.tasks.items()]
    if augments(config):
        facts["translators"] = data.augment.translators
    if task.kind == "sft" and data.tokenizer.path and os.path.isdir(data.tokenizer.path):
        templates = sorted(Path(data.tokenizer.path).glob("**/*chat_template*"))
        facts["chat"] = [path.read_text(encoding="utf-8") for path in templates if path.is_file()]
    for name, s in named:
        columns: list[Any] = []
        if s.kind in TABLES:
            columns = [s.column, s.pair_column, s.label_column, s.target_column, s.messages_column, s.names]
        document = s.document if s.kind == "text" else ""
        facts["sources"].append((name, s.kind, columns, s.prefix, s.task, document, fingerprint(s)))
    return facts


def training_texts(config: Config, named: Named, found: Survey) -> Iterator[str]:
    """What a tokenizer learns from: every field of the rows, source by source in turn, so that the first ones stand for all.

    Args:
        config: its tokenizer of kind chars needs the validation sources too.
        named: (store name, source).
        found: what `survey` found.
    """
    training = [(n, s) for n, s in named if n.startswith("train") or config.data.tokenizer.kind == "chars"]
    streams = [kept_rows(config, name, source, found) for name, source in training]
    while streams:
        left = []
        for stream in streams:
            if (row := next(stream, None)) is not None:
                left.append(stream)
                if config.task.kind == "sft":
                    yield from (m["content"] for m in messages_of(row))
                else:
                    yield from (part for part in (row.text, row.pair, row.target) if part is not None)
        streams = left


def make_examples(
    config: Config, named: Named, found: Survey, *, tokenizer: Path, staging: Path, final: Path, translate: Translate | None,
    progress: bool,
) -> dict[str, Any]:
    """Tokenise the rows of all sources.

    Args:
        config: its task and data.
        named: (store name, source).
        found: what `survey` found.
        tokenizer: the tokenizer's folder.
        staging: where a killed run left what it finished: whole folders NAME, and translations NAME.back.jsonl.
        final: where the folders go.
        translate: texts to their translations, for data.augment.back_translation.
        progress: show a bar.

    Returns:
        For meta.json: by store name the examples and the tokens of each field.
    """  # fmt: skip
    stores: dict[str, Any] = {}
    with Bar("tokenising", total=sum(found.counts.values()), unit="examples", show=progress) as bar:
        for name, source in named:
            part = staging / name
            if not part.is_dir():
                backs = None
                if augments(config) and name.startswith("train"):
                    backs = _translated(config, name, source, found, staging / f"{name}.back.jsonl", translate, progress=progress)
                rows = kept_rows(config, name, source, found)
                _write(rows, part, config=config, source=source, tokenizer=tokenizer, labels=found.labels, backs=backs, bar=bar)
            stores[name] = json.loads((part / "facts.json").read_text(encoding="utf-8"))
    for name, _ in named:
        (staging / name).rename(final / name)
    return stores


def encode_source(
    source: SourceConfig, config: Config, *, tokenizer_folder: Path, labels: Labels, folder: Path, labelled: bool = True
) -> ExampleStore:
    """Tokenise other rows for the task of a config, such as texts to predict on.

    Args:
        source: where they are.
        config: that of the run: its task and cleaning.
        tokenizer_folder: the run's tokenizer.
        labels: `Prepared.labels` of the run.
        folder: where to write, which must not exist; the store reads from it as long as it is used.
        labelled: False reads neither labels nor targets.

    Raises:
        DataError: a row is wrong, or has a label that training does not know.
    """
    rows = read_rows(source, kind=task_kind(config, source), cleaning=config.data.clean, labelled=labelled)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _write(rows, folder, config=config, source=source, tokenizer=tokenizer_folder, labels=labels, labelled=labelled)
    return open_examples(folder, config, source)


def open_examples(folder: Path, config: Config, source: SourceConfig) -> ExampleStore:
    """Open the stores of one source.

    Raises:
        DataError: one is missing, damaged, or of another number of examples than the others.
    """
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        tokens, count, labelled = dict(facts["tokens"]), int(facts["examples"]), bool(facts["labels"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder / 'facts.json'}: missing or damaged; delete {folder.parent} and prepare again") from None
    fields = {field: TokenStore.open(folder / field) for field in tokens}
    for field, store in fields.items():
        if [store.n_documents, store.n_tokens] != [count, tokens[field]]:
            what = f"{store.n_documents} examples of {store.n_tokens} tokens, but {count} of {tokens[field]} were prepared"
            raise DataError(f"{bin_path(folder / field)}: {what}; delete {folder.parent} and prepare again")
    labels = None
    if labelled:
        try:
            labels = np.load(folder / "labels.npy", allow_pickle=False)
        except (OSError, ValueError):
            labels = np.zeros(0)
        if labels.shape != (count,) or labels.dtype not in (np.int64, np.float64):
            raise DataError(f"{folder / 'labels.npy'}: missing or damaged; delete {folder.parent} and prepare again")
    return ExampleStore(fields, labels, task_name(config, source))


def _write(
    rows: Iterable[Row], folder: Path, *, config: Config, source: SourceConfig, tokenizer: Path, labels: Labels,
    backs: Iterable[str] | None = None, labelled: bool = True, bar: Bar | None = None,
) -> None:
    """Write the stores of rows into a folder, which appears when it is whole."""  # fmt: skip
    kind = task_kind(config, source)
    names = labels.get(task_name(config, source), ())
    encode = _encoder(tokenizer, kind)
    dtype = dtype_for(id_count(Tokenizer.from_file(str(tokenizer / "tokenizer.json"))))
    staging = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    fields: dict[str, _Field] = {}
    values: list[float] = []
    rows, backs = iter(rows), iter(backs) if backs is not None else None
    try:
        while batch := list(islice(rows, BATCH)):
            encoded = encode(batch, list(islice(backs, len(batch))) if backs is not None else None)
            for name, documents in encoded.items():
                if name not in fields:
                    fields[name] = _Field(staging / name, DTYPES[1] if name == "flags" else dtype)
                fields[name].add(documents)
            if labelled and kind == "classification":
                values.extend(class_of(row, names, source) for row in batch)
            elif labelled and kind == "regression":
                values.extend(float(row.label or 0.0) for row in batch)
            if bar is not None:
                bar.advance(len(batch))
        with_labels = labelled and kind in LABELLED
        tokens = {name: field.close() for name, field in fields.items()}
        facts = {"examples": fields["text"].count, "tokens": tokens, "labels": with_labels}
        if with_labels:
            with (staging / "labels.npy").open("wb") as file:
                np.save(file, np.array(values, dtype=np.int64 if kind == "classification" else np.float64), allow_pickle=False)
                _flush(file)
        with (staging / "facts.json").open("wb") as file:
            file.write(json.dumps(facts).encode())
            _flush(file)
        staging.rename(folder)
    finally:
        for field in fields.values():
            field.file.close()
        shutil.rmtree(staging, ignore_errors=True)


class _Field:
    """A token store while it is being written."""

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype, self.lengths = prefix, dtype, list[int]()
        self.file = bin_path(prefix).open("wb")

    @property
    def count(self) -> int:
        return len(self.lengths)

    def add(self, documents: Sequence[Any]) -> None:
        self.lengths.extend(map(len, documents))
        self.file.write(b"".join(np.asarray(d, dtype=self.dtype).tobytes() for d in documents))

    def close(self) -> int:
        """Write the index and return the number of tokens."""
        _flush(self.file)
        self.file.close()
        write_index(idx_path(self.prefix), document_lengths=np.array(self.lengths, dtype=np.int64), dtype=self.dtype)
        return sum(self.lengths)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _encoder(folder: Path, kind: str) -> Callable[[list[Row], list[str] | None], dict[str, Sequence[Any]]]:
    """Rows, and the back-translation of each, to the documents of each field.

    The fast encoder is used if it agrees with `tokenizers` on the first batch of each field.
    """
    if kind == "sft":
        chat = load_chat_encoder(folder)

        def conversations(rows: list[Row], backs: list[str] | None) -> dict[str, Sequence[Any]]:
            encoded = chat(rows)
            return {"text": [ids for ids, _ in encoded], "flags": [flags for _, flags in encoded]}

        return conversations
    fast, checked = load_encoder(folder), set[str]()

    def ids(name: str, texts: list[str], rows: list[Row]) -> list[np.ndarray]:
        nonlocal fast
        if name not in checked:
            checked.add(name)
            if not agrees_on(fast, folder, texts):
                fast = load_encoder(folder, fast=False)
        found = [fast.encode(text) for text in texts]
        for row, some in zip(rows, found, strict=True):
            if not len(some):
                raise DataError(f"{row.place}: the tokenizer leaves nothing of the text; drop the row, or give it a text")
        return found

    def encode(rows: list[Row], backs: list[str] | None) -> dict[str, Sequence[Any]]:
        parts = {"text": [r.text for r in rows]}
        for name, texts in (("pair", [r.pair for r in rows]), ("target", [r.target for r in rows]), ("back", backs or [])):
            if filled := [text for text in texts if text is not None]:
                parts[name] = filled
        return {name: ids(name, texts, rows) for name, texts in parts.items()}

    return encode


def _translated(
    config: Config, name: str, source: SourceConfig, found: Survey, file: Path, translate: Translate | None, *, progress: bool
) -> Iterator[str]:
    """The back-translation of each row that stays: of its target for seq2seq, else of its text, with the source's prefix.

    They take long, so what a killed run translated is in `file`, a line a text, and used again.
    """
    done = 0
    if file.is_file():
        whole = [line for line in file.read_bytes().split(b"\n")[:-1] if line]  # the last may be torn
        done = len(whole)
        file.write_bytes(b"".join(line + b"\n" for line in whole))
    rows = islice(kept_rows(config, name, source, found), done, None)
    texts = (_to_translate(row, config, source) for row in rows)
    with (
        file.open("a", encoding="utf-8") as out,
        Bar("translating", total=found.counts[name], unit="examples", show=progress) as bar,
    ):
        bar.advance(done)
        while batch := list(islice(texts, TRANSLATED_AT_ONCE)):
            if translate is None:
                raise DataError("data.augment.back_translation: needs data.augment.translators, the models that translate")
            results = translate(batch)
            assert len(results) == len(batch), f"{len(results)} translations of {len(batch)} texts"
            out.writelines(json.dumps(text) + "\n" for text in results)
            out.flush()
            bar.advance(len(batch))
    with file.open(encoding="utf-8") as lines:
        for row, line in zip(kept_rows(config, name, source, found), lines, strict=True):
            back = json.loads(line)
            # An empty translation is no text to learn from: the example keeps its own.
            yield source.prefix + back if back.strip() else row.text


def _to_translate(row: Row, config: Config, source: SourceConfig) -> str:
    if config.task.kind == "seq2seq":
        return row.target or ""
    return row.text.removeprefix(source.prefix)
