from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distllm.config.errors import DataError
from distllm.config.schema import CleanConfig, SourceConfig
from distllm.data.rows import Row, fingerprint, read_rows

NO, ARE, SET = "no column", "the columns are", "set the source's"
ROWS = [("good film", "1"), ("bad, long\u00e9 film", "0"), ('a "quoted" one', "1")]


def write(path: Path, kind: str, *, header: bool = True) -> Path:
    """The rows as a file of this kind."""
    path = path / f"rows.{kind}"
    if kind == "tsv":
        lines = (["text\tlabel"] if header else []) + ["\t".join(row) for row in ROWS]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "csv":
        quoted = ['"' + text.replace('"', '""') + f'",{label}' for text, label in ROWS]
        path.write_text("\r\n".join((["text,label"] if header else []) + quoted), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": int(x)}) + "\n\n" for t, x in ROWS), encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": [t for t, _ in ROWS], "label": [float(x) for _, x in ROWS]}), path)
    return path


def rows_of(task: str, path: Path, *, cleaning: CleanConfig | None = None, labelled: bool = True, **source: Any) -> list[Row]:
    """The rows of a file whose kind is its ending, unless another is given."""
    given = SourceConfig.model_validate({"kind": path.suffix[1:], "path": str(path), **source})
    return list(read_rows(given, kind=task, cleaning=cleaning, labelled=labelled))


def error_of(task: str, path: Path, **source: Any) -> str:
    with pytest.raises(DataError) as error:
        rows_of(task, path, **source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_labelled_texts(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    rows = rows_of("classification", path)
    assert [(r.text, r.label) for r in rows] == ROWS
    assert all(r.pair is r.target is r.messages is None for r in rows)
    assert [r.label for r in rows_of("regression", path)] == [1.0, 0.0, 1.0]
    bare = rows_of("regression", path, label_column="?", labelled=False)
    assert [(r.text, r.label) for r in bare] == [(text, None) for text, _ in ROWS]


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_no_header_line(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, header=False)
    assert [(r.text, r.label, r.line) for r in rows_of("classification", path, names=["text", "label"])] == [
        (text, label, i) for i, (text, label) in enumerate(ROWS, 1)
    ]
    message = error_of("classification", path)
    assert "no column 'text'; the columns are good film, 1" in message
    assert "for a file without a header line give the source's `names`" in message


def test_a_folder_of_the_hub(tmp_path: Path) -> None:
    write(tmp_path, "parquet")
    rows = rows_of("classification", tmp_path, kind="hub")
    assert [(r.text, r.label) for r in rows] == ROWS
    source = SourceConfig(kind="hub", path=str(tmp_path))
    before = fingerprint(source)
    write(tmp_path, "csv").unlink()
    assert fingerprint(source) == before


def test_packed_files_and_several(tmp_path: Path) -> None:
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"text\tlabel\nb\t1\n"))
    (tmp_path / "a.tsv").write_bytes(b"label\ttext\r\n0\ta\r\n")
    rows = rows_of("classification", tmp_path / "*.tsv*", kind="tsv")
    assert [(r.text, r.label, r.line) for r in rows] == [("a", "0", 2), ("b", "1", 2)]
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"text\tlabel\nb\t1\n")[:-9])
    assert "b.tsv.gz: cannot be unpacked" in error_of("classification", tmp_path / "*.gz", kind="tsv")


def test_quotes_are_text_in_tsv_and_span_lines_in_csv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"half\tx\n\n""\ty\n', encoding="utf-8")
    rows = rows_of("classification", tmp_path / "a.tsv")
    assert [(r.text, r.label, r.line) for r in rows] == [('"half', "x", 2), ('""', "y", 4)]
    (tmp_path / "a.csv").write_text('label,text\nx,"two\nlines"\ny,z\n', encoding="utf-8")
    assert [(r.text, r.line) for r in rows_of("classification", tmp_path / "a.csv")] == [("two\nlines", 2), ("z", 4)]


def test_pairs_and_columns_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("premise,hypothesis,gold,de,en\np,h,yes,ja,yes\n", encoding="utf-8")
    (row,) = rows_of("classification", path, column="premise", pair_column="hypothesis", label_column="gold", prefix="nli: ")
    assert (row.text, row.pair, row.target, row.label) == ("nli: p", "h", None, "yes")
    (row,) = rows_of("seq2seq", path, column="de", target_column="en")
    assert (row.text, row.pair, row.target, row.label) == ("ja", None, "yes", None)


def parallel(tmp_path: Path, de: bytes, en: bytes) -> tuple[Path, dict[str, str]]:
    (tmp_path / "t.de").write_bytes(de)
    (tmp_path / "t.en").write_bytes(en)
    return tmp_path / "t.de", {"kind": "parallel", "target_path": str(tmp_path / "t.en")}


def test_parallel_files(tmp_path: Path) -> None:
    path, source = parallel(tmp_path, "\ufeffeins\r\nzwei 2".encode(), b"one\ntwo\n")
    for task in ("seq2seq", "translation_lm", "sft"):
        assert [(r.text, r.target, r.line) for r in rows_of(task, path, **source)] == [("eins", "one", 1), ("zwei 2", "two", 2)]
    assert [r.text for r in rows_of("seq2seq", path, kind="parallel", labelled=False)] == ["eins", "zwei 2"]
    assert "has no labels" in error_of("classification", path, **source)
    before = fingerprint(SourceConfig.model_validate({"path": str(path), **source}))
    (tmp_path / "t.en").write_bytes(b"one\nTwo\n")
    assert fingerprint(SourceConfig.model_validate({"path": str(path), **source})) != before


def test_parallel_files_that_do_not_fit(tmp_path: Path) -> None:
    path, source = parallel(tmp_path, b"1\n2\n3\n", b"1\n2\n")
    assert f"{path} has 3 lines, but {source['target_path']} has 2" in error_of("seq2seq", path, **source)
    path, source = parallel(tmp_path, b"1\n2\n", b"1\n \n")
    assert f"{source['target_path']}, line 2: the line is empty" in error_of("seq2seq", path, **source)
    path, source = parallel(tmp_path, b"1\n\n", b"1\n2\n")
    assert f"{path}, line 2: the line is empty" in error_of("seq2seq", path, **source)
    assert "needs the file of the targets in `target_path`" in error_of("seq2seq", path, kind="parallel")
    path, source = parallel(tmp_path, b"1\n2\n", b"1\n2\xff\n")
    assert f"{source['target_path']}, line 2: not valid UTF-8 (byte 0xff" in error_of("seq2seq", path, **source)
    assert "t.none: no such file" in error_of("seq2seq", path, kind="parallel", target_path=str(tmp_path / "t.none"))


@pytest.mark.parametrize(
    ("task", "content", "source", "expected"),
    [
        ("classification", "text\tlabels\na\t1\n", {}, f"line 2: {NO} 'label'; {ARE} text, labels; {SET} `label_column`"),
        ("classification", "text\tlabels\na\t1\n", {}, "nearest: labels"),
        ("classification", "Text\tlabel\na\t1\n", {}, f"{NO} 'text'; {ARE} Text, label; {SET} `column`, nearest: Text"),
        ("classification", "text\tlabel\na\t1\n", {"pair_column": "x"}, f"{NO} 'x'; {ARE} text, label; {SET} `pair_column`"),
        ("seq2seq", "text\tlabel\na\t1\n", {}, f"{NO} 'target'; {ARE} text, label; {SET} `target_column`"),
        ("classification", "text\tlabel\na\t1\nb\n", {}, "line 3: 1 cells, but 2 columns (text, label); a text must hold no tab"),
        ("classification", "text\ttext\na\t1\n", {}, "line 1: the header names the column 'text' twice"),
        ("classification", "text\tlabel\na\t1\n \t1\n", {}, "line 3: the text in column 'text' is empty"),
        ("classification", "text\tlabel\na\t1\nb\t\n", {}, "line 3: the label in column 'label' is empty"),
        ("regression", "text\tlabel\na\t1\nb\t\n", {}, "line 3: the label in column 'label' is empty"),
        ("regression", "text\tlabel\na\t1.5\nb\tgood\n", {}, "line 3: the label 'good' in column 'label' is no finite number"),
        ("regression", "text\tlabel\na\tnan\n", {}, "line 2: the label 'nan' in column 'label' is no finite number"),
        ("seq2seq", "text\ttarget\na\t\n", {}, "line 2: the text in column 'target' is empty"),
        ("classification", "text\tlabel\n", {}, "there are no examples in it"),
        ("classification", "text\tlabel\na\0\t1\n", {}, "line 2: a binary file (NUL byte)"),
    ],
)  # fmt: skip
def test_a_wrong_table(tmp_path: Path, task: str, content: str, source: dict[str, str], expected: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(content, encoding="utf-8")
    message = error_of(task, path, **source)
    assert message.startswith(str(path)) and expected in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": 3, "label": 1}', "line 2: column 'text' holds a int, not text; set `column`"),
        ('{"text": "a", "label": null}', "line 2: the label in column 'label' is empty"),
        ('{"text": "a", "label": [1]}', "line 2: column 'label' holds a list, not a label"),
        ('{"text": null, "label": 1}', "line 2: the text in column 'text' is empty"),
        ('{"text": "\\ud800", "label": 1}', "line 2: column 'text' holds half of a surrogate pair"),
        ('{"text": "a"', "line 2: not valid JSON"),
        ("[1]", "line 2: a JSON list"),
        ('{"txt": "a", "label": 1}', f"line 2: {NO} 'text'; {ARE} txt, label; {SET} `column`, nearest: txt"),
    ],
)
def test_wrong_json(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": true}\n' + line + "\n", encoding="utf-8")
    assert expected in error_of("classification", path)
    assert rows_of("classification", write_one(tmp_path / "b.jsonl"))[0].label == "true"


def write_one(path: Path) -> Path:
    path.write_text('{"text": "a", "label": true}\n', encoding="utf-8")
    return path


def test_wrong_csv_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"a" b,1\n', encoding="utf-8")
    assert "a.csv, line 2: not valid CSV" in error_of("classification", tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"text,label\na,1\nb\xe9,1\n")
    assert "a.csv, line 3: not valid UTF-8 (byte 0xe9" in error_of("classification", tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    assert "a.parquet" in error_of("classification", tmp_path / "a.parquet")
    message = error_of("classification", write(tmp_path, "parquet"), label_column="lable")
    assert f"rows.parquet, line 1: {NO} 'lable'; {ARE} text, label; {SET} `label_column`, nearest: label" in message


def test_a_kind_that_has_no_examples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
    message = error_of("classification", tmp_path / "a.txt", kind="text")
    assert "kind=text holds no examples for classification; use tsv, csv, jsonl, parquet, hub" in message
    assert [r.text for r in rows_of("masked_lm", tmp_path / "a.txt", kind="text", document="line")] == ["one"]


def test_texts_are_cleaned_before_they_are_found_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\na  <b>b</b>\t1\n<br>\t0\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 3: the text in column 'text' is empty"):
        rows_of("classification", path, cleaning=CleanConfig(html=True))
    assert [r.text for r in rows_of("classification", path, cleaning=CleanConfig(whitespace=True))] == ["a <b>b</b>", "<br>"]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps({"chat": CHAT}) + "\n", encoding="utf-8")
    else:
        pq.write_table(pa.table({"chat": [[{**CHAT[0], "name": "Al"}, {**CHAT[1], "name": None}]]}), path)
    (row,) = rows_of("sft", path, messages_column="chat")
    assert row.text == "" and row.messages is not None and [m["content"] for m in row.messages] == ["hi", "ho"]
    assert "name" not in row.messages[1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hi", "holds a str; a chat is a list of"),
        ([], "holds an empty list"),
        (["hi"], "message 1 in column 'chat' has no role"),
        ([{"content": "hi"}], "message 1 in column 'chat' has no role"),
        ([*CHAT, {"role": "user", "content": None}], "message 3 in column 'chat' has no text in `content`"),
        (CHAT[:1], "no message in column 'chat' has the role assistant"),
        ([CHAT[0], {"role": "assistant", "content": " "}], "an answer of the assistant is empty"),
    ],
)
def test_wrong_chats(tmp_path: Path, value: Any, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"chat": CHAT}) + "\n" + json.dumps({"chat": value}) + "\n", encoding="utf-8")
    message = error_of("sft", path, messages_column="chat")
    assert "a.jsonl, line 2: " in message and expected in message
