"""Examples as rows of text: labelled texts, pairs, parallel lines and chats, from tables by column name or from two files.

Every way in which an example can be wrong is one line that names the file and the line (for parquet and the hub: the row).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from distllm.config.errors import DataError
from distllm.config.schema import CleanConfig, Config, SourceConfig
from distllm.data.clean import clean, cleans
from distllm.data.documents import ROWS, documents, is_unicode, open_table
from distllm.data.source import Piece, Shard, find_files, fingerprint_files, open_source
from distllm.data.table import cell_rows, json_rows, read_lines, reason

TABLES = ("tsv", "csv", "jsonl", "parquet", "hub")
PAIRED = ("seq2seq", "translation_lm")
EXAMPLE_TASKS = ("classification", "regression", "seq2seq", "translation_lm", "sft", "multi_task")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One example as text, cleaned, its prefix put before it."""

    text: str
    pair: str | None
    target: str | None
    label: str | float | None
    """The label as a name (classification), the number (regression), or None."""
    messages: Messages | None
    """sft: a chat; then `text` is empty."""
    file: str
    line: int
    """From 1; for parquet and the hub the row."""

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True)
class _Cell:
    """A column that a task reads."""

    setting: str
    """The source's setting that names it."""
    column: str


def prefix_of(sources: Sequence[SourceConfig]) -> str:
    """What all sources put before their texts, and so belongs before one that is asked; "" where they differ."""
    found = {source.prefix for source in sources}
    return found.pop() if len(found) == 1 else ""


def task_kind(config: Config, source: SourceConfig) -> str:
    """What the examples of a source are for: the kind of the config's task, or of the source's one of several.

    Raises:
        DataError: multi_task, and the source names no task of the config.
    """
    if config.task.kind != "multi_task":
        return config.task.kind
    if source.task not in config.task.tasks:
        known = ", ".join(config.task.tasks) or "none"
        raise DataError(f"{source.path}: its `task` is {source.task or 'not set'}; task.tasks has {known}")
    return config.task.tasks[source.task].kind


def fingerprint(source: SourceConfig) -> str:
    """What changes when the rows of a source may have changed.

    Raises:
        DataError: there is no such file, or all are empty.
    """
    if source.kind in ("hub", "embedded", "text"):
        return open_source(source, splittable=True).fingerprint
    files = find_files(source)
    if source.kind == "parallel" and source.target_path is not None:
        files = [*files, *find_files(_targets(source))]
    return fingerprint_files(files)


def read_rows(
    source: SourceConfig, *, kind: str, cleaning: CleanConfig | None = None, labelled: bool = True
) -> Iterator[Row]:
    """The examples of a source in order.

    Args:
        source: where they are.
        kind: the task that they are for: classification, regression, seq2seq, translation_lm, sft, or masked_lm of a multi_task.
        cleaning: applied to every text.
        labelled: False reads neither labels nor targets, as for texts to predict on.

    Raises:
        DataError: a file or column is missing, or an example is not as the task needs it; with file and line.
    """
    cleaning = cleaning or CleanConfig()
    cells = _cells(source, kind, labelled=labelled)
    if source.kind == "parallel":
        rows = _parallel(source, kind, labelled=labelled)
    elif source.kind in TABLES:
        rows = (
            _row(cells, values, file, line, source.names, number=kind == "regression") for file, line, values in _table(source)
        )
    elif source.kind in ("text", "embedded") and set(cells) == {"text"}:
        rows = _texts(source)
    else:
        fit = [*TABLES, "parallel"] if kind in (*PAIRED, "sft") else list(TABLES)
        raise DataError(f"{source.path or source.kind}: kind={source.kind} holds no examples for {kind}; use {', '.join(fit)}")
    any_row = False
    for row in rows:
        any_row = True
        yield _finish(row, source, cleaning)
    if not any_row:
        raise DataError(f"{source.path}: there are no examples in it")


def _cells(source: SourceConfig, kind: str, *, labelled: bool) -> dict[str, _Cell]:
    """The columns that a task reads, by the part of the example they are."""
    if kind == "sft" and source.messages_column:
        return {"messages": _Cell("messages_column", source.messages_column)}
    cells = {"text": _Cell("column", source.column)}
    if kind in ("classification", "regression") and source.pair_column:
        cells["pair"] = _Cell("pair_column", source.pair_column)
    if labelled and kind in ("classification", "regression"):
        cells["label"] = _Cell("label_column", source.label_column)
    if labelled and kind in (*PAIRED, "sft"):
        cells["target"] = _Cell("target_column", source.target_column)
    return cells


def _row(
    cells: Mapping[str, _Cell], values: Mapping[str, Any], file: str, line: int, names: list[str], *, number: bool
) -> Row:
    """Pick the columns of a task out of a row of a table and check what they hold."""
    found: dict[str, Any] = {"text": ""}
    for part, cell in cells.items():
        if cell.column not in values:
            raise DataError(_no_column(cell, list(values), file, line, header=not names and file.endswith((".tsv", ".csv"))))
        value, where = values[cell.column], f"{file}, line {line}"
        if part == "label":
            found[part] = _number(value, cell, where) if number else _label(value, cell, where)
        elif part == "messages":
            found[part] = _messages(value, cell, where)
        elif value is None:
            found[part] = ""
        elif not isinstance(value, str):
            raise DataError(f"{where}: column {cell.column!r} holds a {type(value).__name__}, not text; set `{cell.setting}`")
        elif not value.isascii() and not is_unicode(value):
            raise DataError(f"{where}: column {cell.column!r} holds half of a surrogate pair (\\ud800 to \\udfff), no character")
        else:
            found[part] = value
    return Row(
        found["text"], found.get("pair"), found.get("target"), found.get("label"), found.get("messages"), file, line
    )  # fmt: skip


def _no_column(cell: _Cell, columns: list[str], file: str, line: int, *, header: bool) -> str:
    close = difflib.get_close_matches(cell.column.lower(), [c.lower() for c in columns], n=1, cutoff=0.4)
    near = next((c for c in columns if close and c.lower() == close[0]), None)
    text = f"{file}, line {line}: no column {cell.column!r}; the columns are {', '.join(columns) or '(none)'}; "
    text += f"set the source's `{cell.setting}`" + (f", nearest: {near}" if near else "")
    return text + ("; for a file without a header line give the source's `names`" if header else "")


def _label(value: Any, cell: _Cell, where: str) -> str:
    """A label as a name: numbers and truth values as they are written."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: the label in column {cell.column!r} is empty")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int | float):
        raise DataError(f"{where}: column {cell.column!r} holds a {type(value).__name__}, not a label; set `{cell.setting}`")
    return str(value).strip()


def _number(value: Any, cell: _Cell, where: str) -> float:
    """A label as a number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: the label in column {cell.column!r} is empty")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = " ".join(str(value).split())[:60]
        raise DataError(f"{where}: the label {shown!r} in column {cell.column!r} is no finite number, which regression needs")
    return number


def _messages(value: Any, cell: _Cell, where: str) -> Messages:
    """A chat: a list of {role, content}, with a turn of the assistant."""
    shape = 'a chat is a list of {"role": ..., "content": ...}'
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise DataError(f"{where}: column {cell.column!r} holds {what}; {shape}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} in column {cell.column!r} has no role; {shape}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: message {number} in column {cell.column!r} has no text in `content`; {shape}")
    if not any(m["role"] == "assistant" for m in value):
        raise DataError(f"{where}: no message in column {cell.column!r} has the role assistant, so there is nothing to learn")
    return [{k: v for k, v in m.items() if v is not None} for m in value]  # parquet fills every key of every struct


def _finish(row: Row, source: SourceConfig, cleaning: CleanConfig) -> Row:
    """Clean the texts, refuse an empty side, and put the prefix before the text."""
    if row.messages is not None:
        messages = row.messages
        if cleans(cleaning):
            messages = [{**m, "content": clean(m["content"], cleaning)} for m in messages]
        if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
            raise DataError(f"{row.place}: an answer of the assistant is empty")
        return replace(row, messages=messages) if cleans(cleaning) else row
    sides = {"text": row.text, "pair": row.pair, "target": row.target}
    if cleans(cleaning):
        sides = {side: text if text is None else clean(text, cleaning) for side, text in sides.items()}
    for side, text in sides.items():
        if text is None or (text and not text.isspace()):
            continue
        if source.kind == "parallel":
            file = source.target_path if side == "target" else row.file
            raise DataError(f"{file}, line {row.line}: the line is empty; drop it from both files")
        column = {"text": source.column, "pair": source.pair_column, "target": source.target_column}[side]
        raise DataError(f"{row.place}: the text in column {column!r} is empty; drop the row, or give it a text")
    if not source.prefix and not cleans(cleaning):
        return row
    return replace(row, text=source.prefix + (sides["text"] or ""), pair=sides["pair"], target=sides["target"])


def _targets(source: SourceConfig) -> SourceConfig:
    """The source whose `path` is the target's."""
    return source.model_copy(update={"path": source.target_path})


def _parallel(source: SourceConfig, kind: str, *, labelled: bool) -> Iterator[Row]:
    """Line n of one file with line n of the other."""
    if kind not in (*PAIRED, "sft"):
        raise DataError(f"{source.path}: kind=parallel has no labels, so it is not for {kind}; use {', '.join(TABLES)}")
    files = find_files(source)
    if not labelled:
        for file in files:
            for line, text in read_lines(file):
                yield Row(text, None, None, None, None, file, line)
        return
    if not source.target_path:
        raise DataError(f"{source.path}: kind=parallel needs the file of the targets in `target_path`")
    targets = find_files(_targets(source))
    if len(files) != len(targets):
        raise DataError(f"{source.path}: {len(files)} files, but {source.target_path}: {len(targets)}; line n belongs to line n")
    for file, target in zip(files, targets, strict=True):
        for one, other in zip_longest(read_lines(file), read_lines(target)):
            if one is None or other is None:
                counts = [sum(1 for _ in read_lines(f)) for f in (file, target)]
                raise DataError(f"{file} has {counts[0]} lines, but {target} has {counts[1]}; line n belongs to line n")
            yield Row(one[1], None, other[1], None, None, file, one[0])


def _texts(source: SourceConfig) -> Iterator[Row]:
    """The documents of plain text, each an example without a label."""
    opened = open_source(source, splittable=False)
    texts = (text for shard in opened.shards for text in documents(shard))
    for number, text in enumerate(texts, 1):
        yield Row(text, None, None, None, None, opened.label, number)


# --- tables: (file, line, the row's values by column) ------------------------------------------------------------------


def _table(source: SourceConfig) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    if source.kind == "hub":
        yield from _streamed(Shard("table", builder=str(source.path), name=source.name, split=source.split), hint=source.hint)
        return
    for file in find_files(source):
        if source.kind == "parquet":
            yield from _streamed(Shard("table", (Piece(file, 0, 0),), builder="parquet"), hint=None)
        elif source.kind == "jsonl":
            yield from json_rows(file, column=source.column)
        else:
            yield from cell_rows(file, kind=source.kind, names=source.names)


def _streamed(shard: Shard, *, hint: str | None) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """The rows that `datasets` streams."""
    file = shard.pieces[0].path if shard.pieces else shard.builder
    table = open_table(shard, hint=hint)
    number = 0
    try:
        for batch in table.iter(batch_size=ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield file, number, dict(zip(batch, values, strict=True))
    except (DataError, OSError, MemoryError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow and datasets have no common error class
        raise DataError(f"{file}: cannot be read as {shard.builder} after row {number} ({reason(error)})") from None
