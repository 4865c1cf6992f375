"""FLOPs by formula against a count of every operator."""

from __future__ import annotations

import pytest
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tests.models.families import FAMILIES, random_ids, spec_of


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2", "gpt_neox", "opt", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("seq_len", [16, 24])
def test_formula_equals_the_operator_count(kind: str, seq_len: int) -> None:
    spec = spec_of(kind, seq_len=32)
    # Eager, because the counter knows neither the CPU's flash attention nor the grouped product of experts.
    model = transformers.AutoModelForCausalLM.from_config(
        spec.hf_config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=random_ids(2, seq_len)).logits.sum().backward()
    assert spec.flops_per_token is not None
    assert spec.flops_per_token(seq_len) * 2 * seq_len == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_by_hand() -> None:
    spec = spec_of("llama")
    assert spec.flops_per_token is not None
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    matrices = 2 * (attention + 3 * 32 * 64) + 300 * 32  # two layers and the head, not the embedding
    assert spec.flops_per_token(16) == 6 * matrices + 12 * 2 * 32 * 16
    tied = spec_of("llama", tie_word_embeddings=True)
    assert tied.flops_per_token is not None and tied.flops_per_token(16) == spec.flops_per_token(16)


def test_a_sliding_window_limits_attention() -> None:
    near, far = spec_of("mistral", seq_len=64, sliding_window=8), spec_of("mistral", seq_len=64, sliding_window=None)
    assert near.flops_per_token is not None and far.flops_per_token is not None
    assert near.flops_per_token(8) == far.flops_per_token(8)
    assert far.flops_per_token(64) - near.flops_per_token(64) == 12 * 2 * 32 * (64 - 8)


def test_unknown_layers_give_none() -> None:
    from distllm.config.schema import Config, ModelConfig
    from distllm.models.build import resolve_spec

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    assert resolve_spec(Config(model=ModelConfig(type="mamba", sizes=sizes)), vocab_size=300).flops_per_token is None


def test_every_family_has_a_formula() -> None:
    assert all(spec_of(kind).flops_per_token is not None for kind in FAMILIES)
