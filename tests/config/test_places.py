"""What is said of a path that is not there: the key, the value, the rule, and the nearest path that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from distllm.config.places import missing, nearest_place


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("corpus.txt", "data/train.txt", "data/valid.txt", "data/deep/a.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("corpsu.txt", "corpus.txt"), ("./corpsu.txt", "corpus.txt"), ("data/trian.txt", "data/train.txt"),
        ("dta/train.txt", "data/train.txt"), ("dta/trian.txt", "data/train.txt"), ("data/zzzz", "the folder data"),
        ("dat", "the folder HERE"), ("trian.txt/a", "the folder HERE"),
        ("data/dep/a.txt", "data/deep/a.txt"), ("data/xxxxx/a.txt", "the folder data"),
        ("data/deep/../trian.txt", "data/deep/../train.txt"),
    ],
)  # fmt: skip
def test_the_nearest_path(wanted: str, near: str, here: Path) -> None:
    assert nearest_place(wanted).replace(str(here), "HERE") == near


def test_absolute_paths_and_the_working_folder(here: Path) -> None:
    assert nearest_place(here / "data" / "trian.txt") == f"{here}/data/train.txt"
    assert nearest_place("zzzz") == f"the folder {here}"
    assert nearest_place("dat", wanted=Path.is_dir) == "data" and nearest_place("corpus.tx", wanted=Path.exists) == "corpus.txt"
    assert nearest_place("/zzzzzzzz/a.txt") == "the folder /"


def test_the_line_has_key_value_rule_nearest_and_hint() -> None:
    line = "a.path=corpsu.txt: no such file; nearest: corpus.txt; get it from the library"
    assert missing("a.path", "corpsu.txt", hint="get it from the library") == line
    assert missing("a.path", "corpus", like="corpus.tx", what="no pair") == "a.path=corpus: no pair; nearest: corpus.txt"
    Path("a\nb").touch()
    assert missing("a.path", "a\nc") == "a.path='a\\nc': no such file; nearest: 'a\\nb'"
