"""Tensor parallelism under ZeRO 1, 2 and 3 against one process, and checkpoints that cross engines and layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.config.schema import Config
from distllm.engine.deepspeed_start import refuse_unseen_inputs
from distllm.train.build import build
from tests.engine.zero_runs import COMMON, assert_equal_runs, go, zero
from tests.ranks import on_ranks
from tests.runs import state, tiny_config

FAMILIES = {
    "gpt2": "model.sizes={n_embd: 32, n_layer: 2, n_head: 4, attn_pdrop: 0.0, embd_pdrop: 0.0, resid_pdrop: 0.0}",
    "qwen3": "model.sizes={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, head_dim: 8, tie_word_embeddings: false}",
}
"""GPT-2 packs queries, keys and values in one matrix; Qwen3 has norms of which each rank sees its own heads alone."""
STEPS = 4
pytestmark = pytest.mark.deepspeed


def of(family: str) -> tuple[str, str]:
    return (f"model.type={family}", FAMILIES[family])


@pytest.fixture(scope="module")
def references(place: Path) -> dict[str, Path]:
    """The run folder of one process of the native engine, by family."""
    return {family: go(place, f"one-{family}", *of(family), steps=STEPS, ranks=1) for family in FAMILIES}


@pytest.mark.parametrize(
    ("stage", "family", "ranks", "native", "back"),
    [
        (1, "gpt2", 4, ["layout.tp=2"], ["layout.tp=1"]),
        (2, "qwen3", 2, ["layout.tp=1"], ["layout.tp=2", "engine.offload_optimizer=cpu"]),
        (3, "qwen3", 4, ["layout.tp=2"], ["layout.tp=2", "engine.offload_parameters=cpu"]),
        (3, "gpt2", 2, ["layout.tp=1"], ["layout.tp=2", "layout.sequence_parallel=false", "layout.loss_parallel=false"]),
    ],
)
def test_a_run_goes_from_zero_with_tp_to_the_native_engine_and_back(
    stage: int, family: str, ranks: int, native: list[str], back: list[str], place: Path, references: dict[str, Path]
) -> None:
    name, model = f"stage-{stage}-{family}", of(family)
    go(place, name, *model, *zero(stage, "layout.tp=2"), steps=2, ranks=ranks)
    go(place, name, *model, *native, steps=3)
    run = go(place, name, *model, *zero(stage, *back), steps=STEPS)
    assert_equal_runs(run, references[family])


def whole_tensors(world: World, config: Config) -> dict[str, np.ndarray]:
    engine = build(config, world).engine
    return {name: tensor.numpy() for name, tensor in engine.full_tensors()}


@pytest.mark.parametrize("stage", [1, 3])
def test_whole_tensors_are_put_together_from_pieces_in_the_models_own_order(
    stage: int, place: Path, references: dict[str, Path]
) -> None:
    how = ("name=one-gpt2", f"train.steps={STEPS}", *of("gpt2"), *zero(stage, "layout.tp=2"))
    config = tiny_config(place, *COMMON, *how)
    first, second = on_ranks(lambda world: whole_tensors(world, config), 2, place / "ranks")
    saved = {name.removeprefix("model."): value for name, value in state(references["gpt2"]).items() if name.startswith("model.")}
    assert first.keys() == second.keys() == saved.keys()
    assert all(np.array_equal(first[name], value) for name, value in saved.items())
    assert not any(value.size for value in second.values())


def test_a_block_whose_backward_pass_deepspeed_would_not_see_is_refused() -> None:
    block, states = torch.nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    block.register_forward_pre_hook(refuse_unseen_inputs, with_kwargs=True)
    block(states)
    with torch.no_grad():
        block(input=states)
    with pytest.raises(ConfigError, match=r"engine.zero_stage=3: with layout.tp, Linear must be given .*; nearest: 2, or"):
        block(input=states)
