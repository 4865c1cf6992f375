from __future__ import annotations

import numpy as np

from distllm.data.ragged import Ragged, all_rounded, empty, padded, ragged, rounded, seen


def test_widths() -> None:
    lengths = [0, 1, 8, 9, 20, 64, 65, 80, 81, 90]
    want = [8, 8, 8, 9, 20, 64, 72, 80, 88, 90]
    assert [rounded(n, limit=90) for n in lengths] == want
    assert all_rounded(np.array(lengths), limit=90).tolist() == want
    assert rounded(3, limit=5) == 5 and rounded(0, limit=5) == 5


def test_rows_lie_one_after_another() -> None:
    rows = ragged([[1, 2], [], [3]])
    assert rows.ids.tolist() == [1, 2, 3] and rows.ids.dtype == np.int64
    assert rows.starts.tolist() == [0, 2, 2] and rows.bounds.tolist() == [0, 2, 2, 3]
    assert rows.row.tolist() == [0, 0, 2] and rows.column.tolist() == [0, 1, 0]
    assert padded(rows, fill=9, limit=3).tolist() == [[1, 2, 9], [9, 9, 9], [3, 9, 9]]
    part = rows.part(1, 3)
    assert part.ids.tolist() == [3] and part.lengths.tolist() == [0, 1]
    some = rows.chosen(np.array([False, True, True]))
    assert some.ids.tolist() == [2, 3] and some.lengths.tolist() == [1, 0, 1]
    assert isinstance(empty(2), Ragged) and len(empty(2).ids) == 0 and empty(2).lengths.tolist() == [0, 0]


def test_a_row_without_tokens_looks_at_its_first_place() -> None:
    assert seen(np.array([2, 0]), 3).tolist() == [[1, 1, 0], [1, 0, 0]]
