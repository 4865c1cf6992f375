"""The files of a prediction or a measurement: which columns are read, and an answer file that appears whole."""

from __future__ import annotations

import csv
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from distllm.config.errors import ConfigError, DataError, StorageError
from distllm.config.schema import CleanConfig, SourceConfig
from distllm.data.clean import clean
from distllm.data.rows import Row, prefix_of, read_rows
from distllm.train.inference import Source

log = logging.getLogger("distllm")
TABLES = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Columns:
    """The columns of a table by the part of an example that they hold; None: as the run's training source has it."""

    column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    target_column: str | None = None


def source_of(opened: Source, file: Path, *, columns: Columns, task: str = "", target: Path | None = None) -> SourceConfig:
    """How to read a file: its kind by its name, its columns as the run's training source has them.

    Args:
        opened: the model.
        file: a table (.tsv, .csv, .jsonl, .parquet), or plain text with an example a line.
        columns: those that differ.
        task: of a multi_task model, which head the file is for.
        target: for a plain text, the file of the targets.

    Raises:
        ConfigError: a multi_task model and no such task, or a task and another model.
        DataError: the file is not there, or is empty.
    """
    for path in [file] if target is None else [file, target]:
        if not path.is_file():
            raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty")
    tasks = opened.config.task.tasks
    if opened.kind == "multi_task" and task not in tasks:
        raise ConfigError([f"--task={task}: must be one of {', '.join(tasks)}; nearest: {next(iter(tasks))}"])
    if opened.kind != "multi_task" and task:
        raise ConfigError([f"--task={task}: is for multi_task, and {opened.name} is for {opened.kind}; leave it out"])
    known = [s for s in opened.config.data.sources if (s.task or "") == task]
    trained = known[0] if known else SourceConfig()
    if len({s.prefix for s in known}) > 1:
        log.warning("%s: its sources differ in `prefix`, so none is put before the texts of %s", opened.name, file)
    kind = "parallel" if target is not None else TABLES.get(file.suffix.lower(), "text")
    given = {name: value for name, value in vars(columns).items() if value is not None}
    names = trained.names if kind == trained.kind else []
    return trained.model_copy(
        update={
            "kind": kind, "path": str(file), "target_path": None if target is None else str(target), "task": task or None,
            "prefix": prefix_of(known), "document": "line", "messages_column": None, "names": names, "hint": None, **given,
        }
    )  # fmt: skip


def rows_of(
    source: SourceConfig, *, kind: str, cleaning: CleanConfig | None = None, blank: bool = False
) -> Iterator[Row]:
    """The texts of a file in order, their labels and targets unread.

    Args:
        source: from `source_of`.
        kind: the task whose columns are read.
        cleaning: applied to every text.
        blank: whether a line of a plain text may be empty.

    Raises:
        DataError: a column is missing, or a text is empty; with file and line.
    """
    if source.kind != "text":
        yield from read_rows(source, kind=kind, cleaning=cleaning, labelled=False)
        return
    if source.pair_column and kind in ("classification", "regression"):
        raise DataError(f"{source.path}: a plain text has no column {source.pair_column!r}; give a .tsv, .csv or .jsonl file")
    for number, line in enumerate(read_lines(Path(str(source.path))), 1):
        line = line if cleaning is None else clean(line, cleaning)
        if not blank and (not line or line.isspace()):
            raise DataError(f"{source.path}, line {number}: the line is empty; drop it, or give it a text")
        yield Row(source.prefix + line, None, None, None, None, str(source.path), number)


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 text without their ends.

    Raises:
        DataError: a line is not UTF-8.
    """
    with file.open("rb") as binary:
        for number, raw in enumerate(binary, 1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{file}, line {number}: not UTF-8 text") from None
            yield text.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff" if number == 1 else "")


def check_output(output: Path, *, inputs: Sequence[Path]) -> None:
    """Refuse an output that could not be written, before long work.

    Raises:
        ConfigError: it is one of the inputs.
        StorageError: it cannot be written.
    """
    if any(output.exists() and path.exists() and output.samefile(path) for path in inputs):
        raise ConfigError([f"--output={output}: is the input; give another file"])
    if output.is_dir():
        raise StorageError(f"{output}: is a folder; give a file")
    if not output.parent.is_dir():
        raise StorageError(f"{output.parent}: no such folder; make it first")
    if not os.access(output.parent, os.W_OK):
        raise StorageError(f"{output.parent}: cannot be written")


@contextmanager
def whole_file(output: Path) -> Iterator[TextIO]:
    """A text file that appears under its name when the block ends well; before, nothing of it is seen.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp")
    except OSError as error:
        raise StorageError(f"{output}: cannot be written: {error.strerror}") from error
    partial = Path(name)
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # a temporary file is for its owner alone
        partial.replace(output)
    except OSError as error:
        raise StorageError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_texts(output: Path, texts: Sequence[str]) -> None:
    """A text a line, its own line breaks as spaces; in a .jsonl file whole, as {"text": ...}."""
    with whole_file(output) as file:
        if output.suffix.lower() == ".jsonl":
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        else:
            file.writelines(" ".join(text.splitlines()) + "\n" for text in texts)


def write_table(output: Path, header: Sequence[str], rows: Sequence[Sequence[Any]], *, objects: Sequence[Any]) -> None:
    """A table with a header line, with commas in a .csv file, else with tabs; a .jsonl file has the objects instead."""
    with whole_file(output) as file:
        if output.suffix.lower() == ".jsonl":
            file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
        elif output.suffix.lower() == ".csv":
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
        else:
            file.writelines("\t".join(" ".join(str(cell).split()) for cell in row) + "\n" for row in [header, *rows])
