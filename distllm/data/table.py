"""Files of lines, cells and objects, read one line at a time; every way in which one can be wrong names the file and the line."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from distllm.config.errors import DataError

BOM = "\ufeff"


def reason(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    cause = error.__cause__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


def read_lines(file: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, unpacked where its name says that it is packed, with their numbers from 1.

    Raises:
        DataError: it holds a NUL byte, or is not UTF-8.
    """
    try:
        with LocalFileSystem().open(file, "rb", compression="infer") as binary:
            for number, raw in enumerate(binary, 1):
                if b"\0" in raw:
                    raise DataError(f"{file}, line {number}: a binary file (NUL byte); give UTF-8 text")
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    wrong = f"byte 0x{raw[error.start]:02x}: {error.reason}"
                    raise DataError(f"{file}, line {number}: not valid UTF-8 ({wrong}); convert the file to UTF-8") from None
                text = text.removesuffix("\n").removesuffix("\r")
                yield number, text.removeprefix(BOM) if number == 1 else text
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{file}: cannot be unpacked ({reason(error)})") from None


def cell_rows(file: str, *, kind: str, names: Sequence[str]) -> Iterator[tuple[str, int, Mapping[str, str]]]:
    """The rows of a csv or tsv file as (file, line, cells by column); blank lines are left out.

    Args:
        file: its path; unpacked where its name says that it is packed.
        kind: csv, or tsv, which has no quoting.
        names: the names of the columns; empty if the first line has them.

    Raises:
        DataError: it is not UTF-8 or CSV, or a row has more or fewer cells than there are columns.
    """
    columns = list(names)
    for line, cells in _quoted(file) if kind == "csv" else _tabbed(file):
        if not columns:
            columns = [cell.strip() for cell in cells]
            if len(set(columns)) != len(columns):
                twice = next(c for c in columns if columns.count(c) > 1)
                what = f"the header names the column {twice!r} twice"
                raise DataError(f"{file}, line {line}: {what}; for a file without a header line give the source's `names`")
            continue
        if len(cells) != len(columns):
            rule = f"{len(cells)} cells, but {len(columns)} columns ({', '.join(columns)})"
            tip = "quote cells that hold a comma" if kind == "csv" else "a text must hold no tab"
            raise DataError(f"{file}, line {line}: {rule}; {tip}, or mend the header or the source's `names`")
        yield file, line, dict(zip(columns, cells, strict=True))


def _tabbed(file: str) -> Iterator[tuple[int, list[str]]]:
    for line, text in read_lines(file):
        if text:
            yield line, text.split("\t")


def _quoted(file: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv file by RFC 4180, each with the line where it begins."""
    reader = csv.reader((text + "\n" for _, text in read_lines(file)), strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {line}: not valid CSV ({error})") from None


def json_rows(file: str, *, column: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """The objects of a file of JSON lines as (file, line, values by key).

    Raises:
        DataError: it is not UTF-8, or a line is no JSON object; the message shows one with `column`.
    """
    for line, text in read_lines(file):
        if not text or text.isspace():
            continue
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{file}, line {line}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            shape = f'a line must be an object such as {{"{column}": "..."}}'
            raise DataError(f"{file}, line {line}: a JSON {type(row).__name__}, but {shape}")
        yield file, line, row
