"""The formulas against numbers worked out by hand, and shapes read from models."""

from __future__ import annotations

import pytest

from distllm.bench.flops import Shape, conventions, hardware_factor, narayanan, shape_of
from distllm.config.roles import Roles
from distllm.config.schema import Config
from distllm.models.build import resolve_spec

# 2 layers of width 8 with 2 heads of 4, a vocabulary of 10; 1,000 parameters, 80 of them the embedding.
UNTIED = Shape(parameters=1000, embedding=80, tied=False, layers=2, heads=2, head_dims=8, hidden=8, vocab=10)
TIED = Shape(parameters=1000, embedding=80, tied=True, layers=2, heads=2, head_dims=8, hidden=8, vocab=10)


def test_conventions_differ_in_the_parameters_that_count() -> None:
    attention = 12 * 2 * 2 * 4 * 16  # PaLM: 12 L H Q T
    assert conventions(UNTIED, 16) == {
        "palm": 6 * 920 + attention, "nanogpt": 6 * 1000 + attention, "torchtitan": 6 * 920 + attention,
        "narayanan": pytest.approx(72 * 2 * 64 * (1 + 16 / 48 + 10 / 192)),
    }  # fmt: skip
    tied = conventions(TIED, 16)
    assert tied["palm"] == tied["nanogpt"] == 6 * 1000 + attention  # the embedding is the output projection too
    assert tied["torchtitan"] == 6 * 920 + attention


def test_narayanan_is_6n_and_attention_of_a_gpt() -> None:
    """Without attention it is 6 (12 l h^2 + V h), the matrices of a GPT of which the output projection is one."""
    gpt = Shape(parameters=0, embedding=0, tied=True, layers=24, heads=16, head_dims=128, hidden=1024, vocab=51_200)
    matrices = 12 * 24 * 1024**2 + 51_200 * 1024
    assert narayanan(gpt, 0) == pytest.approx(6 * matrices)
    assert narayanan(gpt, 2048) - narayanan(gpt, 0) == pytest.approx(12 * 24 * 1024 * 2048)


def test_full_recomputing_is_a_third_more() -> None:
    assert hardware_factor("none") == 1.0 and hardware_factor("full") == pytest.approx(4 / 3)
    assert hardware_factor("selective") is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_of_a_llama(tied: bool) -> None:
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    config = Config.model_validate({"model": {"type": "llama", "sizes": sizes}, "data": {"seq_len": 16}})
    shape = shape_of(resolve_spec(config, vocab_size=100))
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    whole = 2 * layer + 32 + 100 * 32 * (1 if tied else 2)
    assert shape == Shape(whole, 3200, tied, layers=2, heads=4, head_dims=16, hidden=32, vocab=100)


def test_of_experts_only_those_count_that_a_token_sees() -> None:
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_local_experts": 4, "num_experts_per_tok": 1,
    }  # fmt: skip
    config = Config.model_validate({"model": {"type": "mixtral", "sizes": sizes}})
    shape = shape_of(resolve_spec(config, vocab_size=100))
    assert shape is not None
    assert shape.parameters == 32 * 32 * 4 + 3 * 32 * 48 + 32 * 4 + 2 * 32 + 32 + 2 * 3200


def test_no_formula_holds_for_an_encoder_decoder() -> None:
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = Config.model_validate({"task": {"kind": "seq2seq"}, "model": {"type": "t5", "sizes": sizes}})
    roles = Roles(eos=1, pad=0, begin=None, separator=None, mask=None)
    assert shape_of(resolve_spec(config, vocab_size=50, roles=roles)) is None
