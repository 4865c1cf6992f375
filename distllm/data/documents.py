"""The documents of a shard, as text; every way in which a file can be wrong is one line that names it."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from distllm.config.errors import DataError
from distllm.data.clean import clean, cleans
from distllm.data.source import Piece, Shard
from distllm.data.table import BOM, cell_rows, reason

ROWS = 1000  # rows that `datasets` hands over at once
PARAGRAPHS = re.compile(r"\n[ \t\r]*\n")


def documents(shard: Shard) -> Iterator[str]:
    """The documents of a shard in order, cleaned; empty ones and those that repeat an earlier one are left out.

    Raises:
        DataError: a file is binary, is not UTF-8, has a line that does not parse, or lacks the column; with file and line.
    """
    texts = _uncleaned(shard)
    if cleans(shard.clean):
        texts = (text for text in (clean(t, shard.clean) for t in texts) if text.strip())
    if shard.dropped:
        texts = (text for number, text in enumerate(texts) if number not in shard.dropped)
    return texts


def _uncleaned(shard: Shard) -> Iterator[str]:
    if shard.kind == "table":
        yield from _rows(shard)
        return
    for piece in shard.pieces:
        if shard.kind in ("tsv", "csv"):
            yield from _cells(piece.path, shard)
            continue
        text = read_text(piece)
        if shard.kind == "jsonl":
            yield from _json_lines(text, piece, shard.column)
        elif shard.document == "file":
            if text:
                yield text
        elif shard.document == "line":
            yield from (line for line in (raw.rstrip("\r") for raw in text.split("\n")) if line.strip())
        else:
            yield from (part for part in (p.strip("\r\n") for p in PARAGRAPHS.split(text)) if part.strip())


def read_text(piece: Piece) -> str:
    """The text of a piece of a file, exactly as it is but for a byte order mark at the start.

    Raises:
        DataError: it holds a NUL byte or is not UTF-8.
    """
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        data = file.read(piece.end - piece.start)
    if len(data) != piece.end - piece.start:
        raise DataError(f"{piece.path}: it became shorter while it was read; prepare again when it no longer changes")
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(f"{piece.path}: a binary file (NUL byte at byte {piece.start + zero}); give UTF-8 text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{piece.path}, line {_line_at(piece, error.start, data)}"
        wrong = f"byte 0x{data[error.start]:02x}: {error.reason}"
        raise DataError(f"{where}: not valid UTF-8 ({wrong}); convert the file to UTF-8") from None
    return text.removeprefix(BOM) if piece.start == 0 else text


def _line_at(piece: Piece, offset: int, data: bytes) -> int:
    """The line number, from 1, of a byte of the piece; reads what comes before the piece."""
    before = 0
    with open(piece.path, "rb") as file:
        left = piece.start
        while left > 0 and (block := file.read(min(left, 1 << 24))):
            before += block.count(b"\n")
            left -= len(block)
    return before + data[:offset].count(b"\n") + 1


def _json_lines(text: str, piece: Piece, column: str) -> Iterator[str]:
    """The texts of JSON lines. Parsed here, not by `datasets`, because a byte range can be a shard and an error has a line."""
    position = 0
    for line in text.split("\n"):
        if line and not line.isspace():
            yield from _json_line(line, piece, column, text, position)
        position += len(line) + 1


def _json_line(line: str, piece: Piece, column: str, text: str, position: int) -> Iterator[str]:
    def where() -> str:
        data = text.encode("utf-8", "surrogatepass")
        return f"{piece.path}, line {_line_at(piece, len(text[:position].encode()), data)}"

    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where()}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where()}: a JSON {type(row).__name__}, but a line must be an object such as {{\"{column}\": \"...\"}}")
    if column not in row:
        raise DataError(f"{where()}: no column {column!r}; the columns are {_names(row)}; set the source's `column`")
    value = row[column]
    if value is None or value == "":
        return
    if not isinstance(value, str):
        raise DataError(f"{where()}: column {column!r} holds a {type(value).__name__}, not text; set the source's `column`")
    if not value.isascii() and not is_unicode(value):
        raise DataError(f"{where()}: column {column!r} holds half of a surrogate pair (\\ud800 to \\udfff), no character")
    yield value


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _cells(file: str, shard: Shard) -> Iterator[str]:
    """The texts of a column of a tsv file, or of a csv file without a header line."""
    for _, line, values in cell_rows(file, kind=shard.kind, names=shard.names):
        if shard.column not in values:
            tip = "" if shard.names else ", or for a file without a header line its `names`"
            where = f"{file}, line {line}: no column {shard.column!r}; the columns are {_names(values)}"
            raise DataError(f"{where}; set the source's `column`{tip}")
        if values[shard.column]:
            yield values[shard.column]


def _names(row: Any) -> str:
    return ", ".join(map(str, row)) or "(none)"


def _rows(shard: Shard) -> Iterator[str]:
    """The texts of the rows that `datasets` streams."""
    where = shard.pieces[0].path if shard.pieces else shard.builder
    table = open_table(shard, hint=None)
    rows = table.shard(shard.count, shard.index) if shard.count > 1 else table
    number = 0
    try:
        for batch in rows.iter(batch_size=ROWS):
            if shard.column not in batch:
                raise DataError(
                    f"{where}: no column {shard.column!r}; the columns are {_names(batch)}; set the source's `column`"
                )
            for value in batch[shard.column]:
                number += 1
                if value is None or value == "":
                    continue
                if not isinstance(value, str):
                    what = f"holds a {type(value).__name__} in row {number}, not text"
                    raise DataError(f"{where}: column {shard.column!r} {what}; set the source's `column`")
                yield value
    except (DataError, OSError, MemoryError):
        raise
    except Exception as error:  # pandas, pyarrow and datasets have no common error class
        raise DataError(f"{where}: cannot be read as {shard.builder} after row {number} ({reason(error)})") from None


def open_table(shard: Shard, *, hint: str | None) -> Any:
    """A streaming data set of `datasets`, without its progress bars and with no cache of its own.

    Raises:
        DataError: it does not exist, or cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    files = {shard.split: [os.path.abspath(p.path) for p in shard.pieces]} if shard.pieces else None
    where = shard.pieces[0].path if shard.pieces else shard.builder
    with tempfile.TemporaryDirectory(prefix="distllm-datasets-") as cache:
        try:
            return datasets.load_dataset(
                shard.builder, shard.name, split=shard.split, data_files=files, streaming=True, cache_dir=cache
            )
        except Exception as error:  # the hub, fsspec and pyarrow have no common error class
            more = f"; {hint}" if hint else ""
            raise DataError(f"{where}: cannot be opened as a data set ({reason(error)}){more}") from None
