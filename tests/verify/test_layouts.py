"""Every product of axes once, and the layouts that somebody writes."""

from __future__ import annotations

import pytest

from distllm.config.errors import ConfigError
from distllm.parallel import mesh
from distllm.verify import layouts
from distllm.verify.layouts import layout_of, parse_layouts, products


def test_the_axes_are_those_of_the_mesh() -> None:
    assert layouts.AXES == mesh.AXES


@pytest.mark.parametrize(("ranks", "count"), [(1, 1), (2, 6), (4, 21), (8, 56)])
def test_every_product_comes_once(ranks: int, count: int) -> None:
    found = list(products(ranks))
    assert len(found) == len(set(found)) == count and all(layout.ranks == ranks for layout in found)


def test_layouts_that_somebody_writes() -> None:
    found = parse_layouts("tp=2, pp=2;dp_shard=4,reshard_after_forward=false; layout.tp=1;pp=2,tp=2")
    assert [layout.name for layout in found] == ["pp 2 x tp 2", "dp_shard 4, reshard_after_forward false", "one process"]
    assert found[0].config().dp_shard == 1 and found[1].config().reshard_after_forward is False


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_layouts("tp=0;dp_shard=auto;pp=2,xx=1;dp_shard=4096,tp=2")
    assert len(error.value.problems) == 4
    assert error.value.problems[3].endswith("nearest: dp_shard=2048,tp=2")


def test_a_layout_of_ones_is_one_process() -> None:
    assert layout_of(dict.fromkeys(layouts.AXES, 1)).name == "one process"
