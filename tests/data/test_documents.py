from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from distllm.config.errors import DataError
from distllm.config.schema import SourceConfig
from distllm.data import source as source_module
from distllm.data.documents import documents
from distllm.data.source import embedded_files, open_source
from tests.data.conftest import prose


def texts(*, splittable: bool = True, **source: str) -> list[str]:
    found = open_source(SourceConfig.model_validate(source), splittable=splittable)
    return [d for shard in found.shards for d in documents(shard)]


def refused(**source: str) -> str:
    """The one line that a source is refused with."""
    with pytest.raises(DataError) as error:
        texts(**source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_embedded_is_the_standard_library_and_the_same_each_time() -> None:
    files = embedded_files()
    assert files == sorted(files) == embedded_files()
    names = {os.path.basename(f) for f in files}
    assert {"argparse.py", "dataclasses.py", "typing.py"} <= names
    assert not any(part in f.split(os.sep) for f in files for part in ("test", "tests", "site-packages", "idlelib"))
    source = open_source(SourceConfig(), splittable=True)
    assert 4e6 < source.n_bytes < 2e7
    found = [d for shard in source.shards for d in documents(shard)]
    assert len(found) == sum(os.path.getsize(f) > 0 for f in files)
    assert sum(len(d.encode()) for d in found) == source.n_bytes


def test_what_a_document_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\ntwo\r\n\r\nthree \n\n\n\nfour\n".encode())
    assert texts(kind="text", path=str(path)) == ["one\ntwo\r\n\r\nthree \n\n\n\nfour\n"]
    assert texts(kind="text", path=str(path), document="line") == ["one", "two", "three ", "four"]
    assert texts(kind="text", path=str(path), document="paragraph") == ["one\ntwo", "three ", "four"]


def test_a_glob_is_sorted_and_empty_files_among_others_are_left_out(tmp_path: Path) -> None:
    for name, text in (("b/2.txt", "two"), ("a/1.txt", "one"), ("a/0.txt", ""), ("c.md", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert texts(kind="text", path=str(tmp_path / "**" / "*.txt")) == ["one", "two"]


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_cutting_into_shards_changes_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str) -> None:
    paths = [tmp_path / f"{i}.txt" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_text(prose(400 + 9000 * (i % 2), seed=i), encoding="utf-8")
    whole = texts(kind="text", path=str(tmp_path / "*.txt"), document=document)
    monkeypatch.setattr(source_module, "SHARD_BYTES", 500)
    source = open_source(SourceConfig(kind="text", path=str(tmp_path / "*.txt"), document=document), splittable=True)  # type: ignore[arg-type]
    assert len(source.shards) > 20
    joined: list[str] = []
    for shard in source.shards:
        for i, text in enumerate(documents(shard)):
            if i == 0 and shard.continues:
                joined[-1] += text
            else:
                joined.append(text)
    assert joined == whole
    assert [s.unfinished for s in source.shards[:-1]] == [s.continues for s in source.shards[1:]]


def test_a_tokenizer_that_may_join_across_newlines_gets_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(prose(9000), encoding="utf-8")
    monkeypatch.setattr(source_module, "SHARD_BYTES", 500)
    assert len(open_source(SourceConfig(kind="text", path=str(tmp_path / "a.txt")), splittable=False).shards) == 1


def test_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"row {i} ü \u2028 {prose(i, seed=i)}", "n": i} for i in range(300)] + [{"text": ""}, {"text": None}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=bool(i % 2)) for i, r in enumerate(rows)) + "\n\n", encoding="utf-8")
    expected = [r["text"] for r in rows if r["text"]]
    assert texts(kind="jsonl", path=str(path)) == expected
    monkeypatch.setattr(source_module, "SHARD_BYTES", 1000)
    assert len(open_source(SourceConfig(kind="jsonl", path=str(path)), splittable=True).shards) > 10
    assert texts(kind="jsonl", path=str(path)) == expected


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl.gz", "hub"])
def test_tables_through_datasets(tmp_path: Path, kind: str) -> None:
    rows = [f'text {i}, "quoted"\nand a second line' for i in range(50)]
    if kind == "csv":
        import csv

        path = tmp_path / "a.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["number", "body"], *((i, r) for i, r in enumerate(rows))])
    elif kind == "jsonl.gz":
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(json.dumps({"body": r}) for r in rows).encode()))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"number": list(range(50)), "body": rows}), path, row_group_size=7)
    before = sorted(tmp_path.rglob("*"))
    where = str(tmp_path) if kind == "hub" else str(path)
    assert texts(kind=kind.removesuffix(".gz"), path=where, column="body") == rows
    assert sorted(tmp_path.rglob("*")) == before  # no cache beside the user's files
    if kind != "jsonl.gz":
        wrong = refused(kind=kind, path=where, column="text")
        assert "no column 'text'" in wrong and "number, body" in wrong and where in wrong
        assert "not text" in refused(kind=kind, path=where, column="number")


def test_missing_files_are_named_with_the_hint(tmp_path: Path) -> None:
    path = str(tmp_path / "none.txt")
    assert refused(kind="text", path=path, hint="get it from the library") == f"{path}: no such file; get it from the library"
    assert "no file matches" in refused(kind="text", path=str(tmp_path / "*.txt"))
    assert "is a folder; give a glob" in refused(kind="text", path=str(tmp_path))
    assert "needs a path" in refused(kind="jsonl")
    assert "needs the name of a data set" in refused(kind="hub")


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    wrong = refused(kind="hub", path=str(tmp_path), hint="ask us")
    assert str(tmp_path) in wrong and wrong.endswith("ask us")


@pytest.mark.parametrize(
    ("kind", "data", "wanted"),
    [
        ("text", b"", "the file is empty"),
        ("text", b"abc\n\x00def", "binary file (NUL byte at byte 4)"),
        ("text", b"abc\ndef\nx\xff\n", "line 3: not valid UTF-8 (byte 0xff"),
        ("text", b"abc\nd\xc3", "line 2: not valid UTF-8 (byte 0xc3"),
        ("jsonl", b"", "the file is empty"),
        ("jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "line 3: not valid JSON"),
        ("jsonl", b'{"text": "\xc3\xbc"}\n["a"]\n', "line 2: a JSON list, but a line must be an object"),
        ("jsonl", b'{"text": "a"}\n{"body": "b", "n": 1}\n', "line 2: no column 'text'; the columns are body, n"),
        ("jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2: column 'text' holds a int, not text"),
        ("jsonl", b'{"text": "\\ud800 half"}\n', "line 1: column 'text' holds half of a surrogate pair"),
        ("jsonl", b'{"text": "a\xff"}\n', "line 1: not valid UTF-8"),
        ("jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("csv", b"", "the file is empty"),
        ("csv", b'text\n"never closed\n', "cannot be read as csv"),
        ("parquet", b"PAR1 no parquet at all", "as "),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, kind: str, data: bytes, wanted: str) -> None:
    path = tmp_path / f"bad.{kind}"
    path.write_bytes(data)
    wrong = refused(kind=kind, path=str(path))
    assert wrong.startswith(str(path)) and wanted in wrong
    assert len(wrong) < 600


def test_a_line_number_counts_what_other_shards_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 200)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "something"}\n' * 99 + '{"text": \n' + '{"text": "something"}\n' * 20)
    assert f"{path}, line 100: not valid JSON" in refused(kind="jsonl", path=str(path))


def test_the_fingerprint_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    config = SourceConfig(kind="text", path=str(path))

    def fingerprint() -> str:
        return open_source(config, splittable=True).fingerprint

    path.write_text("one")
    first = fingerprint()
    os.utime(path, (1, 1))
    assert fingerprint() == first
    path.write_text("two")
    assert fingerprint() != first
    monkeypatch.setattr(source_module, "HASHED_BYTES", 2)
    by_time = fingerprint()
    os.utime(path, (2, 2))
    assert fingerprint() != by_time
