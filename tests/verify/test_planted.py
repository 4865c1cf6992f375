"""Every planted bug is caught in the layout in which it is planted; without one the same layouts are equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from distllm.comm import World
from distllm.engine import local
from distllm.verify.command import Verification, _plant
from distllm.verify.layouts import layout_of
from distllm.verify.planted import FAULTS, Fault
from distllm.verify.trial import Case


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_bug_is_caught(fault: Fault, verification: Verification, mixture: Verification) -> None:
    told = _plant(mixture if "ep" in fault.layout else verification, fault)
    assert told["caught"] is True, told


@pytest.mark.parametrize("layout", list({tuple(fault.layout.items()) for fault in FAULTS}), ids=str)
def test_without_a_bug_the_same_layout_is_equal(
    layout: tuple[tuple[str, int], ...], verification: Verification, mixture: Verification
) -> None:
    row = (mixture if dict(layout).get("ep") else verification).sound(layout_of(dict(layout)))
    assert row.equal, (row.refused, row.broken, row.verdict and row.verdict.problems)


def test_a_bug_without_a_place_is_told_and_not_counted(verification: Verification) -> None:
    (fault,) = (fault for fault in FAULTS if "ep" in fault.layout)
    told = _plant(verification, fault)
    assert told["caught"] is None and "experts" in told["by"]


def test_a_layout_that_differs_anyway_catches_nothing(verification: Verification, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Verification(verification.config, verification.data, verification.options)
    monkeypatch.setattr(local, "_sharding_groups", lambda parameter: ())
    (fault,) = (fault for fault in FAULTS if fault.name == "averaged shards")
    told = _plant(fresh, fault)
    assert told["caught"] is False and told["by"] == "the layout differs without it too"


def test_the_page_lists_every_bug() -> None:
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
    for fault in FAULTS:
        assert f"| {fault.name} | {fault.what} | {layout_of(fault.layout).name} |" in page


def test_a_bug_that_is_not_caught_is_told(verification: Verification) -> None:
    told = _plant(verification, Fault("harmless", "changes nothing", {"dp_shard": 2}))
    assert told["caught"] is False


def test_there_are_the_fifteen_kinds_and_each_has_one_name() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 15


def test_a_bug_that_breaks_the_run_is_not_caught_by_that(verification: Verification) -> None:
    def fail(case: Case, world: World) -> Case:
        raise RuntimeError("the bug itself is broken")

    told = _plant(verification, Fault("broken", "never runs", {"dp_shard": 2}, changes=fail))
    assert told["caught"] is False and told["by"] == "RuntimeError: the bug itself is broken"


def test_a_refusal_speaks_of_the_users_own_numbers(verification: Verification) -> None:
    row = verification.run(layout_of({"tp": 3}))
    assert row.refused == ("layout.tp=3: must divide the 4 attention heads; nearest: 2",)
