from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distllm.data import stream as stream_module
from distllm.data.order import held_out
from distllm.data.store import TokenStore, dtype_for, write_store
from distllm.data.stream import Stream, split_by_document, split_by_position, whole


def numbered(folder: Path, *, documents: int, seed: int = 0) -> TokenStore:
    """A store where each token is the number of its document."""
    lengths = np.random.default_rng(seed).integers(1, 9, size=documents)
    write_store(folder / "s", [np.full(n, d) for d, n in enumerate(lengths)], dtype=dtype_for(60_000))
    return TokenStore.open(folder / "s")


def all_of(stream: Stream) -> np.ndarray:
    return stream.rows(np.array([0]), stream.n_tokens)[0]


@pytest.mark.parametrize("at_once", [7, 64, 1 << 22])
def test_documents_are_on_one_side_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(stream_module, "DOCUMENTS_AT_ONCE", at_once)
    store = numbered(tmp_path, documents=300)
    train, validation = split_by_document(store, fraction=0.3, seed=8)
    side = held_out(300, fraction=0.3, seed=8)
    tokens = store.read(0, store.n_tokens)
    assert np.array_equal(all_of(train), tokens[~side[tokens]])
    assert np.array_equal(all_of(validation), tokens[side[tokens]])


def test_rows_from_anywhere_are_windows_of_the_whole(tmp_path: Path) -> None:
    train, _ = split_by_document(numbered(tmp_path, documents=300), fraction=0.3, seed=8)
    every = np.append(all_of(train), np.zeros(50, dtype=np.int64))
    positions = np.arange(0, train.n_tokens, 3)
    rows = train.rows(positions, 37)
    assert np.array_equal(rows, every[positions[:, None] + np.arange(37)])


def test_begins_marks_the_first_token_of_every_document(tmp_path: Path) -> None:
    for stream in (*split_by_document(numbered(tmp_path, documents=200), fraction=0.4, seed=1),):
        tokens = all_of(stream)
        expected = np.append(True, tokens[1:] != tokens[:-1])
        assert np.array_equal(stream.begins(np.array([0]), stream.n_tokens)[0], expected)
        positions = np.arange(0, stream.n_tokens - 20, 7)
        assert np.array_equal(stream.begins(positions, 20), expected[positions[:, None] + np.arange(20)])


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("documents", [2, 3, 10])
def test_no_side_is_left_without_a_document(tmp_path: Path, documents: int, fraction: float) -> None:
    store = numbered(tmp_path, documents=documents)
    for seed in range(5):
        train, validation = split_by_document(store, fraction=fraction, seed=seed)
        assert train.n_tokens and validation.n_tokens
        assert train.n_tokens + validation.n_tokens == store.n_tokens


def test_seeds_choose_other_documents(tmp_path: Path) -> None:
    store = numbered(tmp_path, documents=300)
    a, b = (split_by_document(store, fraction=0.3, seed=s)[1] for s in (1, 2))
    assert not np.array_equal(all_of(a), all_of(b))


def test_by_position_does_not_count_end_marks(tmp_path: Path) -> None:
    """Documents of 4 letters and an end mark: half of the 40 letters are those of the first 5 documents."""
    write_store(tmp_path / "s", [np.array([1, 1, 1, 1, 0])] * 10, dtype=dtype_for(10))
    store = TokenStore.open(tmp_path / "s")
    for fraction, train_letters in ((0.5, 20), (0.1, 36), (0.45, 22), (0.0, 40)):
        train, validation = split_by_position(store, fraction=fraction)
        assert int((all_of(train) == 1).sum()) == train_letters
        assert train.n_tokens + validation.n_tokens == 50


def test_whole_is_the_store(tmp_path: Path) -> None:
    store = numbered(tmp_path, documents=20)
    assert np.array_equal(all_of(whole(store)), store.read(0, store.n_tokens))
