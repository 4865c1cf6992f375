"""What a comparison must not let pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from distllm.verify.command import Verification
from distllm.verify.judge import judge
from distllm.verify.layouts import layout_of
from distllm.verify.ranks import Broken, on_ranks
from distllm.verify.trial import Case, Piece, RankReport, Trace, run_rank

Found = tuple[Case, list[RankReport], Trace]


@pytest.fixture(scope="module")
def found(verification: Verification) -> Found:
    """What two shards and one process found, all equal."""
    case = verification.case(verification.small(layout_of({"dp_shard": 2})))
    reference = verification.reference(case)
    assert not isinstance(reference, Broken)
    reports = on_ranks(lambda world: run_rank(case, world, reference), 2, timeout_s=60.0)
    assert not isinstance(reports, Broken)
    return case, reports, reference


def first(pieces: dict[str, Piece], change: Callable[[Piece], Piece]) -> dict[str, Piece]:
    name = next(iter(pieces))
    return {**pieces, name: change(pieces[name])}


def problems(found: Found, change: Callable[[RankReport], RankReport]) -> tuple[str, ...]:
    case, (one, two), reference = found
    return judge(case, [one, change(two)], reference).problems


def test_what_is_equal_has_no_problems(found: Found) -> None:
    verdict = judge(*found)
    assert verdict.problems == () and verdict.compared > 10_000 and not verdict.unjudged
    assert max(verdict.errors.values()) < 1e-12 and len(verdict.by_tensor) > 10


def test_a_number_that_is_none(found: Found) -> None:
    (line,) = problems(found, lambda r: replace(r, losses=[math.nan, *r.losses[1:]]))
    assert line.startswith("loss: inf is above 1e-12, step 1 on rank 1")


def test_one_wrong_gradient_of_one_step(found: Found) -> None:
    def change(report: RankReport) -> RankReport:
        wrong = first(dict(report.gradients[1]), lambda p: replace(p, error=1e-9))
        return replace(report, gradients=[report.gradients[0], wrong, report.gradients[2]])

    (line,) = problems(found, change)
    assert line.startswith("gradient: ") and line.endswith("at step 2")


def test_weights_that_start_elsewhere_by_one_bit(found: Found) -> None:
    (line,) = problems(found, lambda r: replace(r, starts=first(dict(r.starts), lambda p: replace(p, error=1e-17))))
    assert line.startswith("start: ")


def test_a_piece_that_nobody_holds(found: Found) -> None:
    (line,) = problems(found, lambda r: replace(r, weights=first(dict(r.weights), lambda p: replace(p, boxes=()))))
    assert line.startswith("weight: no rank holds all of ")


def test_a_sample_that_is_read_twice(found: Found) -> None:
    one = found[1][0]
    (line,) = problems(found, lambda r: replace(r, rows=[one.rows[0], *r.rows[1:]]))
    assert line.startswith("data: at step 1 the ranks read samples ")


def test_a_sample_with_other_tokens(found: Found) -> None:
    (line,) = problems(found, lambda r: replace(r, rows=[{n: "0" * 16 for n in r.rows[0]}, *r.rows[1:]]))
    assert line == "data: at step 1 a sample holds other tokens than on one process"


def test_a_step_that_was_not_taken(found: Found) -> None:
    (line,) = problems(found, lambda r: replace(r, factors=r.factors[:-1]))
    assert line == "clip: inf is above 1e-12, 2 of 3 steps on rank 1"


def test_a_rank_that_took_no_part(found: Found) -> None:
    lines = problems(found, lambda r: replace(r, traffic={}))
    assert lines == ("rank 1: took no part: it sent nothing at the last step",)
