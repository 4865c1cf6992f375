"""Sources of text as a deterministic list of shards, each of which a worker reads on its own.

How a source is cut depends on its files alone, never on the number of workers. A shard is a run of documents or, when one
document is a large file, a piece of it. What a shard holds is read by `documents.py`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from distllm.config.errors import DataError
from distllm.config.places import missing
from distllm.config.schema import CleanConfig, Config, SourceConfig
from distllm.data.store import bin_path, idx_path, prefix_of

SHARD_BYTES = 8 << 20  # about half a second of tokenising
MOST_SHARDS = 4096  # a shard costs two small files while a store is being prepared
HASHED_BYTES = 256 << 20  # a source up to this size is known by its content, a larger one by sizes and times
# Generated tables, test suites and programs on top of the library: not the code that a reader would call the library.
EMBEDDED_SKIPPED = frozenset({
    "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "site-packages",
    "dist-packages", "__pycache__", "lib-dynload",
})  # fmt: skip
LINE_END = re.compile(rb"\n")
PARAGRAPH_END = re.compile(rb"\n[ \t\r]*\n")
# A newline between two visible ASCII characters: no pre-tokeniser of ours joins text across it, so ids do not change.
SAFE_CUT = re.compile(rb"[!-~]\n(?=[!-~])")


@dataclass(frozen=True)
class Piece:
    """The bytes [start, end) of a file."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """A part of a source, small enough to send to a worker by pickle."""

    kind: str
    """A kind of SourceConfig, or `table` for what `datasets` reads."""
    pieces: tuple[Piece, ...] = ()
    document: str = "file"
    column: str = "text"
    builder: str = ""
    """For table: csv, parquet, json, or a hub name."""
    name: str | None = None
    split: str = "train"
    index: int = 0
    count: int = 1
    """For table: this shard is number `index` of `count`."""
    continues: bool = False
    """The first document began in the shard before."""
    unfinished: bool = False
    """The last document goes on in the next shard."""
    names: tuple[str, ...] = ()
    """For csv and tsv: the names of the columns where no header line has them."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """How each document is cleaned."""
    dropped: frozenset[int] = frozenset()
    """Documents, by number from 0, that are left out because they repeat an earlier one."""

    @property
    def n_bytes(self) -> int:
        """The bytes of text in it, 0 if not known before reading."""
        return sum(p.end - p.start for p in self.pieces)


@dataclass(frozen=True)
class Source:
    """A source, found and cut."""

    label: str
    """What to call it in messages."""
    shards: tuple[Shard, ...]
    fingerprint: str
    """Changes when the text may have changed."""
    n_bytes: int
    """The bytes of its files, 0 if not known."""


def check_files(config: Config) -> None:
    """Refuse a config whose sources name files that are not there, by the key that names them.

    Raises:
        DataError: the first of them, with the nearest file and the source's hint.
    """
    data = config.data
    for place, sources in (("data.sources", data.sources), ("data.validation.sources", data.validation.sources)):
        for number, source in enumerate(sources):
            check_source(source, key=f"{place}.{number}")


def check_source(source: SourceConfig, *, key: str) -> None:
    """Refuse a source whose files are not there.

    Args:
        source: of any kind.
        key: the config's key of the source.

    Raises:
        DataError: the first of them, with the nearest file and the source's hint.
    """
    for name, path in _paths(source):
        _check_path(f"{key}.{name}", path, hint=source.hint)
    if source.kind == "tokens" and source.path:
        _check_pair(f"{key}.path", source.path, hint=source.hint)


def _paths(source: SourceConfig) -> Iterator[tuple[str, str]]:
    """The keys of a source that name files or globs, with their values."""
    if source.path and source.kind not in ("embedded", "hub", "tokens"):
        yield "path", source.path
    if source.target_path and source.kind == "parallel":
        yield "target_path", source.target_path


def _check_path(key: str, path: str, *, hint: str | None) -> None:
    if os.path.isdir(path):
        raise DataError(f"{key}={path}: is a folder; nearest: a glob of its files, such as {os.path.join(path, '**', '*')}")
    if os.path.isfile(path) or any(map(os.path.isfile, glob.iglob(path, recursive=True))):
        return
    raise DataError(missing(key, path, what="no file matches" if glob.has_magic(path) else "no such file", hint=hint))


def _check_pair(key: str, path: str, *, hint: str | None) -> None:
    prefix = prefix_of(path)
    for file in (bin_path(prefix), idx_path(prefix)):
        if not file.is_file():
            rule = f"there is no {file.name}; a token store is a pair {prefix.name}.bin and {prefix.name}.idx"
            raise DataError(missing(key, path, what=rule, like=file, hint=hint))


def open_source(source: SourceConfig, *, splittable: bool, clean: CleanConfig | None = None) -> Source:
    """Find the files of a source, check that they can be there, and cut it into shards.

    Args:
        source: any kind but `tokens`.
        splittable: whether a large text file may be cut at a newline without changing its ids.
        clean: how each document is cleaned.

    Raises:
        DataError: there is no such file, or nothing in it.
    """
    clean = clean or CleanConfig()
    if source.kind == "hub":
        return _open_hub(source, clean=clean)
    if source.kind == "parallel":
        raise DataError(f"{source.path}: kind=parallel is for task.kind seq2seq, translation_lm and sft, not for packed text")
    files = embedded_files() if source.kind == "embedded" else find_files(source)
    sizes = [os.path.getsize(f) for f in files]
    label = "the standard library" if source.kind == "embedded" else str(source.path)
    if not sum(sizes):
        raise DataError(f"{label}: the file is empty" if len(files) == 1 else f"{label}: all {len(files)} files are empty")
    if source.kind == "tsv" or (source.kind == "csv" and source.names):
        plain = Shard(source.kind, column=source.column, names=tuple(source.names), clean=clean)
        shards = [replace(plain, pieces=(Piece(f, 0, size),)) for f, size in zip(files, sizes, strict=True) if size]
    elif source.kind in ("csv", "parquet") or (source.kind == "jsonl" and any(map(_is_packed, files))):
        plain = Shard("table", column=source.column, builder=source.kind.replace("jsonl", "json"), clean=clean)
        shards = [
            replace(plain, pieces=(Piece(f, 0, size),))
            for f, size in zip(files, sizes, strict=True) if size
        ]  # fmt: skip
    else:
        plain = Shard(source.kind, document=_document(source), column=source.column, clean=clean)
        shards = list(_cut(plain, files, sizes, splittable=splittable))
    return Source(label, tuple(shards), _fingerprint(files, sizes), sum(sizes))


def embedded_files() -> list[str]:
    """The running Python's own library, `.py` files in the order of their paths; what does not decode as UTF-8 is left out."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(d for d in folders if d not in EMBEDDED_SKIPPED and not d.startswith("config-"))
        found += [os.path.join(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    return [f for f in sorted(found) if _is_text(f)]


def _is_text(path: str) -> bool:
    try:
        data = Path(path).read_bytes()
        data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return b"\0" not in data


def find_files(source: SourceConfig) -> list[str]:
    """The files that `source.path`, a path or a glob, stands for, sorted.

    Raises:
        DataError: none, with the source's hint.
    """
    path = source.path
    if not path:
        raise DataError(f"data.sources: kind={source.kind} needs a path: set `path` to a file or a glob")
    hint = f"; {source.hint}" if source.hint else ""
    if os.path.isdir(path):
        raise DataError(f"{path}: is a folder; give a glob of its files, such as {os.path.join(path, '**', '*')}")
    if os.path.isfile(path):
        return [path]
    files = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    if not files:
        what = "no file matches" if glob.has_magic(path) else "no such file"
        raise DataError(f"{path}: {what}{hint}")
    return files


def _is_packed(path: str) -> bool:
    return path.endswith((".gz", ".zst", ".bz2", ".xz"))


def _document(source: SourceConfig) -> str:
    return "line" if source.kind == "jsonl" else source.document if source.kind == "text" else "file"


def _cut(plain: Shard, files: Sequence[str], sizes: Sequence[int], *, splittable: bool) -> Iterator[Shard]:
    """Group small files and cut large ones into shards, like `plain`, of about SHARD_BYTES."""
    target = max(SHARD_BYTES, sum(sizes) // MOST_SHARDS)
    whole_file = plain.document == "file"
    end = SAFE_CUT if whole_file else LINE_END if plain.document == "line" else PARAGRAPH_END
    group: list[Piece] = []
    for path, size in zip(files, sizes, strict=True):
        if size == 0:
            continue
        if size <= 2 * target or (whole_file and not splittable):
            group.append(Piece(path, 0, size))
            if sum(p.end - p.start for p in group) >= target:
                yield replace(plain, pieces=tuple(group))
                group = []
            continue
        if group:
            yield replace(plain, pieces=tuple(group))
            group = []
        cuts = [0, *_cuts(path, size, target, end), size]
        for a, b in pairwise(cuts):
            yield replace(
                plain, pieces=(Piece(path, a, b),), continues=whole_file and a > 0, unfinished=whole_file and b < size
            )
    if group:
        yield replace(plain, pieces=tuple(group))


def _cuts(path: str, size: int, target: int, end: re.Pattern[bytes]) -> Iterator[int]:
    """The places, about `target` bytes apart, that follow a match of `end`."""
    window, overlap = 1 << 20, 4096
    with open(path, "rb") as file:
        at = target
        while at < size - target // 2:
            file.seek(at)
            data = file.read(window + overlap)
            match = end.search(data)
            if match is None or match.end() == len(data):
                at += window  # the overlap keeps a match that lies across two windows
                continue
            yield at + match.end()
            at += match.end() + target


def _fingerprint(files: Sequence[str], sizes: Sequence[int]) -> str:
    """A digest of the content of a small source; of paths, sizes and modification times of a large one.

    Reading a small source takes less than a second, so that a copied or touched file is not tokenised again.
    """
    digest = hashlib.sha256()
    if sum(sizes) <= HASHED_BYTES:
        for file, size in zip(files, sizes, strict=True):
            digest.update(f"{size}\n".encode())
            digest.update(Path(file).read_bytes())
    else:
        facts = [(os.path.abspath(f), size, os.stat(f).st_mtime_ns) for f, size in zip(files, sizes, strict=True)]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def fingerprint_files(files: Sequence[str]) -> str:
    """A digest that changes when the content of the files may have changed.

    Raises:
        DataError: there is nothing in them.
    """
    sizes = [os.path.getsize(f) for f in files]
    if not sum(sizes):
        what = "the file is empty" if len(files) == 1 else f"all {len(files)} files are empty"
        raise DataError(f"{files[0]}: {what}")
    return _fingerprint(files, sizes)


def _open_hub(source: SourceConfig, *, clean: CleanConfig) -> Source:
    """A data set by hub name or folder, known by its name and revision: what the hub changes later is not noticed offline."""
    from distllm.data.documents import open_table

    if not source.path:
        raise DataError("data.sources: kind=hub needs the name of a data set in `path`")
    plain = Shard("table", column=source.column, builder=source.path, name=source.name, split=source.split, clean=clean)
    table = open_table(plain, hint=source.hint)
    count = min(int(table.num_shards), MOST_SHARDS)
    shards = tuple(replace(plain, index=i, count=count) for i in range(count))
    checks = table.info.download_checksums or {}
    facts = [source.path, source.name, source.split, source.column, sorted(map(str, checks)), str(table.info.version), count]
    if os.path.isdir(source.path):
        below = sorted(str(p) for p in Path(source.path).rglob("*") if p.is_file())
        facts.append(_fingerprint(below, [os.path.getsize(p) for p in below]))
    return Source(source.path, shards, hashlib.sha256(json.dumps(facts).encode()).hexdigest(), 0)
