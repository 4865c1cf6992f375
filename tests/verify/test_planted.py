"""Every planted bug is caught in the layout in which it is planted; without one the same layouts are equal."""

from __future__ import annotations

import pytest

from distllm.verify.command import Verification, _plant
from distllm.verify.layouts import layout_of
from distllm.verify.planted import FAULTS, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_bug_is_caught(fault: Fault, verification: Verification) -> None:
    told = _plant(verification, fault)
    assert told["caught"] is not False, told
    if told["caught"] is None:
        assert fault.layout.keys() & {"tp", "pp", "cp", "ep"}, told  # of layouts that this model or build has not


@pytest.mark.parametrize("layout", list({tuple(fault.layout.items()) for fault in FAULTS}), ids=str)
def test_without_a_bug_the_same_layout_is_equal(layout: tuple[tuple[str, int], ...], verification: Verification) -> None:
    row = verification.run(layout_of(dict(layout)))
    assert row.holds, (row.broken, row.verdict and row.verdict.problems)


def test_a_bug_that_is_not_caught_is_told(verification: Verification) -> None:
    told = _plant(verification, Fault("harmless", "changes nothing", {"dp_shard": 2}))
    assert told["caught"] is False


def test_there_are_the_fifteen_kinds_and_each_has_one_name() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 15
