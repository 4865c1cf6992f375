from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from distllm.config.schema import CleanConfig, SourceConfig
from distllm.data.clean import clean, cleans
from distllm.data.documents import documents
from distllm.data.prepare import prepare
from distllm.data.source import open_source
from tests.data.conftest import config_for

MESSY = "<p>A&nbsp;b\u200b  &amp; c\r\n</p>\x07<!-- no -->ﬁn"


def test_off_changes_nothing() -> None:
    assert clean(MESSY, CleanConfig()) == MESSY and not cleans(CleanConfig())


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({"unicode": "NFC"}, "e\u0301 ﬁ", "é ﬁ"),
        ({"unicode": "NFKC"}, "ﬁ ①", "fi 1"),
        ({"unicode": "NFD"}, "é", "e\u0301"),
        ({"lowercase": True}, "ROMEO: Ça Straße", "romeo: ça straße"),
        ({"lowercase": True, "unicode": "NFKC"}, "\U0001d400bc É", "abc é"),
        ({"control": True}, "a\x00b\x07\tc\nd\r\u200be\ufeff\u00ad\u202ef\x85", "ab\tc\ndef"),
        ({"control": True}, "été 漢字 🙂 \u00a0", "été 漢字 🙂 \u00a0"),
        ({"whitespace": True}, " \ta  b\n\n c\u00a0d\u2003 ", "a b c d"),
        ({"html": True}, "a <b>bol</b>d<br>x<script>if (a<b) {}</script> &amp;&lt;", "a bold\nx &<"),
        ({"html": True}, "<style>p {}</style><p>one</p><p>two</p>", "one\ntwo\n"),
        ({"html": True}, "x<!-- c -->y <![CDATA[a<b & c]]>", "xy a<b & c"),
        ({"html": True}, "a < b, 3 <4 & so <![on x] &x", "a < b, 3 <4 & so <![on x] &x"),
        ({"html": True}, "no markup", "no markup"),
        ({"html": True, "control": True, "whitespace": True}, "a&#8203;b &#9; c", "ab c"),
    ],
)
def test_each_step(options: dict[str, object], text: str, expected: str) -> None:
    config = CleanConfig.model_validate(options)
    assert clean(text, config) == expected
    assert cleans(config)


def test_all_steps_and_again() -> None:
    config = CleanConfig(unicode="NFKC", lowercase=True, control=True, whitespace=True, html=True)
    assert clean(MESSY, config) == "a b & c fin"
    assert clean(clean(MESSY, config), config) == "a b & c fin"


def test_documents_are_cleaned_and_empty_ones_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<b>one</b>  x\n<br>\ntwo\n", encoding="utf-8")
    source = SourceConfig(kind="text", path=str(path), document="line")
    cleaned = open_source(source, splittable=True, clean=CleanConfig(html=True, whitespace=True))
    assert list(documents(cleaned.shards[0])) == ["one x", "two"]
    assert list(documents(pickle.loads(pickle.dumps(cleaned.shards[0])))) == ["one x", "two"]
    assert list(documents(open_source(source, splittable=True).shards[0])) == ["<b>one</b>  x", "<br>", "two"]


def test_cleaning_packed_text_is_another_store(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a  b\n" * 50, encoding="utf-8")
    source = {"kind": "text", "path": str(path), "document": "line"}
    plain, clean_ = (prepare(config_for(tmp_path, sources=[source], clean=c)) for c in ({}, {"whitespace": True}))
    assert plain.digest != clean_.digest
    assert [p.stores[0].n_tokens for p in (plain, clean_)] == [50 * 5, 50 * 4]


def test_a_large_file_is_cleaned_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag may lie across the place where a file would be cut."""
    monkeypatch.setattr("distllm.data.source.SHARD_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_text("x\n" * 100 + "<script>\n" + "hidden\n" * 100 + "</script>", encoding="utf-8")
    prepared = prepare(config_for(tmp_path, sources=[{"kind": "text", "path": str(path)}], clean={"html": True}))
    assert prepared.stores[0].n_tokens == 200 + 1
