"""The parity matrix: every family under every layout computes what one process computes, in fp64 to 1e-12.

A cell compares losses, every gradient, norms, clip factors, every weight, the order of samples, and the kinds, calls and bytes of
collectives with the formulas, by the same code as `distllm verify`. Where a layout does not apply, its refusal is the test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from distllm.verify.command import Verification
from distllm.verify.layouts import layout_of
from tests.verify.small import verification_of

TWO: list[dict[str, Any]] = [
    {"dp_replicate": 2}, {"dp_shard": 2}, {"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"pp": 2},
    {"cp": 2, "cp_method": "ring"}, {"cp": 2, "cp_method": "all_gather"}, {"cp": 2, "cp_method": "ulysses"},
]  # fmt: skip
FOUR: list[dict[str, Any]] = [
    {"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "tp": 2}, {"dp_shard": 2, "cp": 2},
    {"pp": 2, "dp_shard": 2}, {"pp": 2, "dp_replicate": 2}, {"pp": 2, "tp": 2}, {"pp": 2, "cp": 2}, {"cp": 2, "tp": 2}, {"tp": 4},
    {"pp": 2, "pp_schedule": "interleaved_1f1b"}, {"pp": 4, "pp_schedule": "gpipe"}, {"cp": 4, "cp_method": "ring"},
]  # fmt: skip
EIGHT: list[dict[str, Any]] = [{"pp": 2, "dp_shard": 2, "tp": 2}, {"dp_shard": 2, "cp": 2, "tp": 2}, {"pp": 2, "cp": 2, "tp": 2}]
SOME: list[dict[str, Any]] = [
    {"dp_replicate": 2}, {"dp_shard": 2}, {"tp": 2}, {"pp": 2}, {"cp": 2}, {"dp_shard": 2, "tp": 2}, {"pp": 2, "dp_shard": 2},
    {"cp": 2, "tp": 2},
]  # fmt: skip
EXPERTS: list[dict[str, Any]] = [
    {"ep": 2}, {"ep": 4}, {"dp_shard": 2, "ep": 2}, {"dp_replicate": 2, "ep": 2}, {"ep": 2, "cp": 2},
]  # fmt: skip
BOTH_WAYS: list[dict[str, Any]] = [
    {"dp_replicate": 2}, {"dp_shard": 2}, {"tp": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}, {"tp": 4},
]  # fmt: skip
NEITHER: list[dict[str, Any]] = [{"pp": 2}, {"cp": 2}]


@dataclass(frozen=True)
class Family:
    """A model family, and the layouts under which it is looked at."""

    overrides: tuple[str, ...]
    layouts: list[dict[str, Any]]
    refused: list[dict[str, Any]] = field(default_factory=list)


def of_type(kind: str, **sizes: Any) -> tuple[str, ...]:
    values = ", ".join(f"{name}: {str(value).lower()}" for name, value in sizes.items())
    return (f"model={{type: {kind}, sizes: {{{values}}}}}",)


GROUPED = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
PAIRS = (
    "task.kind=seq2seq", "data.sources=[{kind: tsv, path: PAIRS}]", "data.tokenizer.kind=bytes", "data.seq_len=48",
    "train.sample_every=0",
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "llama": Family(of_type("llama", **GROUPED, tie_word_embeddings=True), [*TWO, *FOUR, *EIGHT], [{"ep": 2}]),
    "qwen3": Family(of_type("qwen3", **GROUPED), SOME),
    "mixtral": Family(of_type("mixtral", **GROUPED, num_local_experts=4), [*SOME, *EXPERTS]),
    "qwen3_moe": Family(of_type("qwen3_moe", **GROUPED, num_experts=4, num_experts_per_tok=2), EXPERTS),
    "gpt2": Family(of_type("gpt2"), SOME),
    "gpt_neox": Family(of_type("gpt_neox"), SOME),
    "own": Family(("model={spec: 'tests.parity.own:spec'}",), SOME),
    "bert": Family((*of_type("bert"), "task.kind=masked_lm"), BOTH_WAYS, NEITHER),
    "t5": Family((*of_type("t5"), *PAIRS), BOTH_WAYS, NEITHER),
}


def cells(*, refused: bool) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, layout) for name, family in FAMILIES.items() for layout in (family.refused if refused else family.layouts)
    ]


def name_of(value: object) -> str:
    return layout_of(value).name.replace(" ", "") if isinstance(value, dict) else str(value)


Opener = Callable[[str], Verification]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """The verification of a family; each computes its references once."""

    @cache
    def open_family(name: str) -> Verification:
        folder = tmp_path_factory.mktemp(name)
        pairs = folder / "pairs.tsv"
        lines = [f"the {i} cats of house {i * 7 % 13}\tdie {i} Katzen aus Haus {i * 7 % 13}" for i in range(200)]
        pairs.write_text("\n".join(["text\ttarget", *lines]) + "\n", encoding="utf-8")
        return verification_of(folder, *(o.replace("PAIRS", str(pairs)) for o in FAMILIES[name].overrides))

    return open_family


def test_there_are_sixty_cells_and_more() -> None:
    assert len(cells(refused=False)) >= 60
    assert {layout_of(layout).ranks for _, layout in cells(refused=False)} == {2, 4, 8}


@pytest.mark.parametrize(("family", "layout"), cells(refused=False), ids=name_of)
def test_a_layout_computes_what_one_process_computes(family: str, layout: dict[str, Any], opened: Opener) -> None:
    row = opened(family).run(layout_of(layout))
    assert not row.refused and not row.broken, row.refused or row.broken
    assert row.verdict is not None and row.verdict.problems == (), row.verdict
    assert max(row.verdict.errors.values()) <= 1e-12
    assert row.traffic == row.expected != []


@pytest.mark.parametrize(("family", "layout"), cells(refused=True), ids=name_of)
def test_what_does_not_apply_is_refused_by_a_rule(family: str, layout: dict[str, Any], opened: Opener) -> None:
    row = opened(family).run(layout_of(layout))
    (axis,) = layout
    assert row.refused and row.refused[0].startswith(f"layout.{axis}=2: ") and "nearest: 1" in row.refused[0]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_no_reference_is_dead(family: str, opened: Opener) -> None:
    verification = opened(family)
    assert verification.guard(verification.sound(layout_of({"dp_shard": 2}))) == []
