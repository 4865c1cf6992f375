from __future__ import annotations

import random
from pathlib import Path

import pytest

from distllm.config.errors import DataError
from distllm.config.schema import DedupConfig
from distllm.data.dedup import Repeats, drops, jaccard, shingles
from distllm.data.prepare import prepare
from tests.data.conftest import config_for

VOCABULARY = [f"w{i}" for i in range(500)]


def kept(texts: list[str], **options: object) -> list[int]:
    repeats = Repeats(DedupConfig.model_validate(options))
    return [i for i, text in enumerate(texts) if not repeats.seen(text)]


def test_exact_keeps_the_first() -> None:
    assert kept(["a", "b", "a", "A", "b ", "b"], exact=True) == [0, 1, 3, 4]
    assert kept(["a", "a"]) == [0, 1] and not drops(DedupConfig()) and drops(DedupConfig(near=0.5))


def test_shingles_and_their_overlap() -> None:
    assert len(shingles("a b c d", ngram=3)) == 2 and len(shingles("a a a a", ngram=3)) == 1
    assert len(shingles("a b", ngram=3)) == 1 == len(shingles("", ngram=3))
    one, other = shingles("a b c d", ngram=1), shingles("b c d e", ngram=1)
    assert jaccard(one, other) == 3 / 5 and jaccard(one, one) == 1.0


def changed(text: str, words: int) -> str:
    """The text with its last words replaced."""
    parts = text.split()
    return " ".join(parts[:-words] + [f"new{i}" for i in range(words)])


def test_near_repeats_are_found_and_others_stay() -> None:
    draw = random.Random(3)
    texts = [" ".join(draw.choices(VOCABULARY, k=60)) for _ in range(100)]
    close = [changed(text, 2) for text in texts]  # 2 of 60 runs differ: Jaccard 56 / 60
    far = [changed(text, 20) for text in texts]  # 20 differ: 38 / 78
    assert kept([*texts, *far, *close], near=0.85, ngram=3) == list(range(200))


def test_no_false_alarm_at_the_threshold() -> None:
    """What hashing takes for near is compared by its true similarity."""
    base = "a b c d e f g h i j"
    for text, similarity in ((changed(base, 1), 9 / 11), (changed(base, 2), 8 / 12)):
        for threshold in (0.6, 0.7, 0.8, 0.9):
            expected = [0] if similarity >= threshold else [0, 1]
            assert kept([base, text], near=threshold, ngram=1) == expected


def test_it_is_the_same_again() -> None:
    draw = random.Random(5)
    texts = [" ".join(draw.choices(VOCABULARY[:12], k=8)) for _ in range(300)]
    first = kept(texts, near=0.5, ngram=1)
    assert first == kept(texts, near=0.5, ngram=1) and 1 < len(first) < 300


@pytest.mark.parametrize("dedup", [{"exact": True}, {"near": 0.8}, {}])
def test_packed_text_over_all_training_sources(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dedup: dict[str, object]
) -> None:
    long = "the cat sat on the mat and looked at the old dog over there by the door of the house"
    (tmp_path / "a.txt").write_text(f"one\ntwo\none\n{long}\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text(f"two\nthree\n{long} again\n", encoding="utf-8")
    sources = [{"kind": "text", "path": str(tmp_path / name), "document": "line"} for name in ("a.txt", "b.txt")]
    caplog.set_level("INFO")
    config = config_for(tmp_path, sources=sources, validation={"sources": sources[:1]}, dedup=dedup)
    prepared = prepare(config)
    expected = {"exact": [3, 2], "near": [3, 1], "": [4, 3]}["".join(dedup)]
    assert [s.n_documents for s in prepared.stores] == expected
    assert [s.n_documents for s in prepared.validation_stores] == [4]
    assert ("b.txt: 1 of 3 documents repeat" in caplog.text) == (dedup == {"exact": True})
    if "exact" in dedup:
        with pytest.raises(DataError, match=r"b\.txt: all 3 documents repeat earlier ones, and data\.dedup drops them; leave"):
            prepare(config_for(tmp_path, sources=[*sources, sources[1]], dedup=dedup))
    if dedup:
        assert prepared.digest != prepare(config_for(tmp_path, sources=sources, validation={"sources": sources[:1]})).digest
