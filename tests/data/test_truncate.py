from __future__ import annotations

import re

import numpy as np
import pytest

from distllm.config.errors import DataError
from distllm.data.truncate import Kept, kept, refuse_long, shared_room, windows


def cut(tokens: list[int], what: Kept) -> list[int]:
    """Token j is token j of the text before the cut, and token j + skip from there on."""
    length, at, skip = (int(values[0]) for values in (what.length, what.cut, what.skip))
    return [tokens[j if j < at else j + skip] for j in range(length)]


@pytest.mark.parametrize(
    ("rule", "want"),
    [("head", [0, 1, 2, 3, 4]), ("tail", [5, 6, 7, 8, 9]), ("middle", [0, 1, 2, 8, 9]), ("refuse", [0, 1, 2, 3, 4])],
)
def test_what_is_kept_of_a_long_text(rule: str, want: list[int]) -> None:
    assert cut(list(range(10)), kept(np.array([10]), np.array([5]), rule=rule)) == want


def test_of_an_even_room_head_and_tail_have_half_each() -> None:
    assert cut(list(range(10)), kept(np.array([10]), np.array([4]), rule="middle")) == [0, 1, 8, 9]


@pytest.mark.parametrize("rule", ["head", "tail", "middle"])
@pytest.mark.parametrize("length", [0, 1, 4, 5])
def test_a_short_text_stays_whole(rule: str, length: int) -> None:
    assert cut(list(range(length)), kept(np.array([length]), np.array([5]), rule=rule)) == list(range(length))


def test_of_a_pair_the_longer_text_gives_first() -> None:
    """As if tokens were taken one by one from the longer text."""
    for first in range(12):
        for second in range(12):
            for room in range(1, 14):
                a, b = first, second
                while a + b > room:
                    a, b = (a - 1, b) if a > b else (a, b - 1)
                got = tuple(int(n[0]) for n in shared_room(np.array([first]), np.array([second]), np.array([room])))
                assert got == (a, b), (first, second, room)


def test_windows_overlap_by_the_stride_and_miss_nothing() -> None:
    lengths, room, stride = np.array([3, 10, 11, 0, 27]), 10, 4
    text, first = windows(lengths, room=room, stride=stride)
    assert text.tolist() == [0, 1, 2, 2, 3, 4, 4, 4, 4]
    assert first.tolist() == [0, 0, 0, 6, 0, 0, 6, 12, 18]
    for i, n in enumerate(lengths.tolist()):
        mine = first[text == i]
        assert {t for f in mine.tolist() for t in range(f, min(f + room, n))} == set(range(n))
        assert all(n - f > stride for f in mine[1:].tolist()), "a window has something that the one before has not"


def test_long_examples_are_refused_with_the_longest_and_what_works() -> None:
    refuse_long(np.array([3, 8]), limit=8, what="input", where="data.sources.0", rules="head", examples=np.arange(2))
    want = (
        "data.seq_len=8: 2 of 4 examples of data.sources.1 are longer and data.truncate=refuse; the longest is example 17, whose "
        "input takes 12 tokens with its special tokens; nearest: data.seq_len=12, or data.truncate=head or tail"
    )
    with pytest.raises(DataError, match=re.escape(want)):
        refuse_long(
            np.array([3, 9, 12, 8]), limit=8, what="input", where="data.sources.1", rules="head or tail",
            examples=np.array([1, 4, 17, 20]),
        )  # fmt: skip
