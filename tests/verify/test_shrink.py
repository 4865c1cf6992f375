"""A small model keeps the traits of the large one, and its sizes divide."""

from __future__ import annotations

from typing import Any

import pytest

from distllm.config.errors import ConfigError
from distllm.config.schema import Config, DataConfig, ModelConfig, TaskConfig
from distllm.data.tokenizer import Roles
from distllm.models.build import meta_model, resolve_spec
from distllm.verify.layouts import layout_of
from distllm.verify.shrink import Degrees, degrees_of, folded, shrink

ROLES = Roles(eos=0, pad=1, begin=2, separator=0, mask=3)


def config_of(kind: str, task: str = "causal_lm", **sizes: Any) -> Config:
    return Config(model=ModelConfig(type=kind, sizes=sizes), task=TaskConfig(kind=task), data=DataConfig(seq_len=64))  # type: ignore[arg-type]


def small(config: Config, degrees: Degrees) -> Any:
    known = resolve_spec(config, vocab_size=300, roles=ROLES).hf_config
    return resolve_spec(shrink(config, known, degrees), vocab_size=300, roles=ROLES)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("llama", "causal_lm"), ("qwen3", "causal_lm"), ("gpt2", "causal_lm"), ("gpt_neox", "causal_lm"), ("opt", "causal_lm"),
        ("mixtral", "causal_lm"), ("qwen3_moe", "causal_lm"), ("gpt_neo", "causal_lm"), ("gemma3_text", "causal_lm"),
        ("bert", "masked_lm"), ("t5", "seq2seq"), ("bart", "seq2seq"), ("marian", "seq2seq"),
    ],
)  # fmt: skip
def test_families_shrink_to_what_divides(kind: str, task: str) -> None:
    spec = small(config_of(kind, task), Degrees(layers=4, heads=4, experts=8))
    model, config = meta_model(spec), spec.hf_config
    assert sum(p.numel() for p in model.parameters()) < 3_000_000
    assert config.num_hidden_layers == 4 and config.num_attention_heads % 4 == 0
    assert all(value == 0.0 for name, value in config.to_dict().items() if "drop" in name and isinstance(value, float))
    assert len(list(model.get_submodule(spec.blocks[0]).children())) == 4


def test_traits_stay() -> None:
    tied = config_of("qwen3", num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
    grouped = small(tied, Degrees()).hf_config
    assert grouped.num_attention_heads // grouped.num_key_value_heads == 4 and grouped.tie_word_embeddings
    one_key = small(config_of("llama", num_attention_heads=8, num_key_value_heads=1, hidden_size=64), Degrees(heads=4)).hf_config
    assert one_key.num_key_value_heads == 1 and one_key.num_attention_heads % 4 == 0
    mixture = small(config_of("qwen3_moe"), Degrees(experts=8)).hf_config
    assert mixture.num_experts == 8 and mixture.num_experts_per_tok == 2


def test_what_a_layout_asks_for() -> None:
    assert degrees_of(layout_of({"pp": 4, "tp": 2, "cp": 2}).sizes, virtual=2) == Degrees(8, 4, 4, 32)
    assert degrees_of(layout_of({"ep": 8, "tp": 32}).sizes, virtual=1) == Degrees(2, 32, 8, 64)


def test_training_is_kept_to_what_can_be_compared() -> None:
    config = shrink(config_of("llama"), None, Degrees())
    assert not config.train.compile and config.train.ema == 0.0 and config.schedule.warmup == 0
    assert config.distill.teacher is None and config.train.micro_batch == 1


def test_code_that_comes_with_a_model_is_refused() -> None:
    config = config_of("llama")
    known = resolve_spec(config, vocab_size=300).hf_config
    foreign = config.model_copy(update={"model": ModelConfig(path="some/where", trust_remote_code=True)})
    with pytest.raises(ConfigError, match=r"verify cannot shrink a model that brings code of its own; nearest: model.type=llama"):
        shrink(foreign, known, Degrees())


def test_only_a_huge_vocabulary_of_a_causal_model_is_folded() -> None:
    config = config_of("llama")
    assert folded(config, vocab_size=8192) is None and folded(config, vocab_size=128_256) == 4096
    assert folded(config_of("bert", "masked_lm"), vocab_size=128_256) is None
