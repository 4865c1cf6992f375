"""The formulas by themselves: what no small run shows. That they are what is sent, every cell of the parity matrix shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distllm.config.schema import ActivationConfig
from distllm.models.build import meta_model
from distllm.verify.command import Verification
from distllm.verify.formulas import expected_traffic, gathers_of_stage, unpredictable
from distllm.verify.layouts import AXES, layout_of
from distllm.verify.ledger import Step
from distllm.verify.local_shapes import local_numbers, own_shape, parts_of, stages_of
from distllm.verify.trial import Micro


def step_of(verification: Verification, *, micro: int = 4, place: dict[str, int] | None = None, **values: object) -> Step:
    """One step of a layout on the small model, with so many micro-batches of one row of 32 tokens."""
    layout = layout_of(values)
    case = verification.case(verification.small(layout))
    where = dict.fromkeys(AXES, 0) | (place or {})
    return Step(case.config, case.spec, meta_model(case.spec), layout.sizes, where, [Micro(1, 32, 32, 20)] * micro)


def test_twice_the_micro_batches_twice_the_shards_but_one_norm(verification: Verification) -> None:
    one, two = (expected_traffic(step_of(verification, micro=n, dp_shard=2)) for n in (2, 4))
    for kind in ("all_gather", "reduce_scatter"):
        assert two[("dp_shard", kind)].bytes == 2 * one[("dp_shard", kind)].bytes
    assert two[("dp_shard", "all_reduce")] == one[("dp_shard", "all_reduce")]


def test_shards_are_padded_to_equal_rows(verification: Verification) -> None:
    step = step_of(verification, dp_shard=8)
    name, weight = "model.embed_tokens.weight", step.model.get_parameter("model.embed_tokens.weight")
    rows, width = weight.shape
    assert rows % 8 != 0
    assert local_numbers(step, name, weight, 8) == -(-rows // 8) * width
    last = replace(step, place={**step.place, "dp_shard": 7})
    assert own_shape(last, name, weight) == (rows - 7 * -(-rows // 8), width)


def test_parts_of_a_pipeline_are_the_model(verification: Verification) -> None:
    step = step_of(verification, pp=2)
    stages = stages_of(step)
    assert stages is not None and stages.tied == ("model.embed_tokens.weight",)
    parts = [part for rank in range(2) for part in parts_of(replace(step, place={**step.place, "pp": rank}), stages)]
    held = [name for part in parts for unit in (*part.blocks, part.rest) for name in unit]
    every = [name for name, _ in step.model.named_parameters()]
    assert sorted(held) == sorted([*every, *stages.tied])
    assert (parts[0].first, parts[0].last, parts[-1].first, parts[-1].last) == (True, False, False, True)


@pytest.mark.parametrize(
    ("values", "rank", "times"),
    [
        ({"pp_schedule": "gpipe"}, 0, 5),  # each of 4 forward passes, and once for all backward passes
        ({"pp_schedule": "1f1b"}, 0, 5),
        ({"pp_schedule": "1f1b"}, 1, 5),
        ({"pp_schedule": "1f1b", "reshard_after_forward": False}, 0, 1),
    ],
)
def test_a_block_of_a_stage_is_gathered_as_its_schedule_runs(
    values: dict[str, object], rank: int, times: int, verification: Verification
) -> None:
    assert gathers_of_stage(step_of(verification, pp=2, dp_shard=2, place={"pp": rank}, **values), rank) == times


def test_a_rank_in_the_middle_of_a_pipeline_sends_both_ways(verification: Verification) -> None:
    ends, middle = (expected_traffic(step_of(verification, pp=4, place={"pp": rank})) for rank in (3, 1))
    assert middle[("pp", "send")].calls == 2 * 4 and ends[("pp", "send")].calls == 4 + 1  # and the gradient of the tied weight


def test_what_has_no_formula_says_why(verification: Verification) -> None:
    step = step_of(verification, tp=2)
    again = step.config.model_copy(update={"activation": ActivationConfig(mode="full")})
    assert unpredictable(step.config, step.spec, step.model, step.sizes) is None
    assert "recomputed" in str(unpredictable(again, step.spec, step.model, step.sizes))
    assert unpredictable(again, step.spec, step.model, layout_of({"dp_shard": 2}).sizes) is None
    low = step.config.model_copy(update={"precision": step.config.precision.model_copy(update={"compute": "bf16"})})
    assert "autocast" in str(unpredictable(low, step.spec, step.model, step.sizes))
