"""Any transformers causal language model as a spec, and every mistake in one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import Config, DataConfig, ModelConfig
from distllm.models.build import meta_model, resolve_spec
from tests.models.families import FAMILIES, VOCABULARY, config_of, filled, random_ids, spec_of


@pytest.mark.parametrize(("width", "product"), [(24, "grouped_mm"), (22, "eager")])
def test_experts_of_any_width_are_multiplied(width: int, product: str) -> None:
    spec = spec_of("mixtral", intermediate_size=width, num_local_experts=4)
    assert spec.ep_plan["model.layers.*.mlp.experts"] == "ep_dispatch_experts"
    model = filled(spec)
    assert model.config._experts_implementation == product
    logits = model(input_ids=random_ids(2, 5)).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(input_ids=random_ids(2, 5)).logits, logits)


@pytest.mark.parametrize("kind", FAMILIES)
def test_finds_the_parts_of_every_family(kind: str) -> None:
    spec = spec_of(kind)
    model = meta_model(spec)
    assert spec.name == kind and len(spec.blocks) == 1 and spec.head is not None
    assert len(model.get_submodule(spec.blocks[0])) == 2
    assert model.get_submodule(str(spec.embedding)).weight.shape == (VOCABULARY, 32)
    assert model.get_submodule(str(spec.head)).weight.shape == (VOCABULARY, 32)
    assert "norm" in type(model.get_submodule(str(spec.norm))).__name__.lower()
    inside = f"{spec.blocks[0]}."
    for path in (spec.embedding, spec.norm, spec.head):
        assert not str(path).startswith(inside)
    for pattern in spec.tp_plan:
        head, _, tail = pattern.partition(".*.")
        model.get_submodule(head)
        assert not tail or pattern.startswith(inside)


def test_the_tensor_parallel_plan_has_full_names() -> None:
    plan = spec_of("llama").tp_plan
    assert plan["model.layers.*.self_attn.q_proj"] == "colwise"
    assert plan["model.layers.*.mlp.down_proj"] == "rowwise"
    assert plan["lm_head"] == "colwise_gather_output" and plan["model.embed_tokens"] == "embedding_rowwise"
    assert spec_of("gpt2").tp_plan["transformer.h.*.attn.c_attn"] == "qkv_colwise"  # transformers has no plan for it
    assert spec_of("gpt_neo").tp_plan == {}


@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_documents_give_the_logits_of_separate_ones(kind: str) -> None:
    attention = "eager" if kind == "llama" else "auto"
    spec = resolve_spec(config_of(kind, cross=False, attention=attention), vocab_size=VOCABULARY)
    model, ids = filled(spec), random_ids(2, 16)
    documents = torch.tensor([0] * 6 + [1] * 10)
    mask = (documents[:, None] == documents[None]) & torch.ones(16, 16, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(6), torch.arange(10)]).expand(2, -1)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, attention_mask=mask.expand(2, 1, 16, 16)).logits
        first, second = model(input_ids=ids[:, :6]).logits, model(input_ids=ids[:, 6:]).logits
    torch.testing.assert_close(packed, torch.cat([first, second], dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_token_does_not_see_the_next(kind: str) -> None:
    model, ids = filled(spec_of(kind)), random_ids(1, 16)
    other = ids.clone()
    other[:, 8:] = 7
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[:, :8], model(input_ids=other).logits[:, :8])


def test_an_encoder_family_becomes_causal() -> None:
    sizes = FAMILIES["phi"]
    spec = resolve_spec(Config(model=ModelConfig(type="bert", sizes=sizes), data=DataConfig(seq_len=16)), vocab_size=99)
    model, ids = filled(spec), random_ids(1, 16) % 99
    other = ids.clone()
    other[:, 8:] = 7
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[:, :8], model(input_ids=other).logits[:, :8])


def test_vocabulary_and_positions_follow_from_the_data() -> None:
    spec = spec_of("gpt2", seq_len=24)
    assert (spec.vocab_size, spec.max_seq_len) == (VOCABULARY, 24)
    spec = spec_of("gpt2", seq_len=24, n_positions=64, vocab_size=320)
    assert (spec.vocab_size, spec.max_seq_len) == (320, 64)
    # A padding row would never learn, and the defaults are the ids of another tokenizer.
    model = meta_model(spec_of("opt"))
    assert model.get_submodule("model.decoder.embed_tokens").padding_idx is None


def test_sizes_may_have_the_common_names_and_yaml_floats() -> None:
    config = spec_of("gpt2", layer_norm_epsilon="1e-6", initializer_range=1).hf_config
    assert (config.n_embd, config.layer_norm_epsilon, config.initializer_range) == (32, 1e-6, 1.0)
    assert spec_of("llama", rope_theta=500.0).hf_config.rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"hidden_sise": 1}, r"model\.sizes\.hidden_sise: llama has no such size; the nearest is hidden_size"),
        ("llama", {"hidden_size": "big"}, r"model\.sizes\.hidden_size=big: .*expected int, got str"),
        ("llama", {"hidden_size": 33}, r"model\.sizes.*not a multiple of the number of attention heads"),
        ("gpt2", {"vocab_size": 299}, r"model\.sizes\.vocab_size=299: the tokenizer has 300 ids"),
        ("gpt2", {"n_positions": 8}, r"16: the model has 8 positions; use data\.seq_len=8 or model\.sizes\.n_positions=16"),
    ],
)
def test_wrong_sizes(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        spec_of(kind, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "lama"}, r"model\.type=lama: is not a model of transformers; the nearest is llama"),
        ({"type": "t5"}, r"model\.type=t5: is not a causal language model"),
        ({"type": "roberta"}, r"roberta counts positions by its padding token"),
        ({"type": "llama", "path": "x"}, r"exactly one of .*, and there is also model.path"),
        ({}, r"exactly one of .* must be set"),
        (
            {"type": "gpt_neo", "sizes": {"num_layers": 2}, "attention": "sdpa"},
            r"model\.attention=sdpa: gpt_neo: .*use model\.attention=auto",
        ),
    ],
)
def test_wrong_models(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_spec(Config(model=ModelConfig(**model)), vocab_size=300)
    assert "\n" not in str(caught.value)


def test_packing_is_refused_where_the_mask_would_not_hold() -> None:
    with pytest.raises(ConfigError, match=r"sliding window of 8 < data\.seq_len; use model\.sizes\.sliding_window=16"):
        resolve_spec(config_of("mistral", cross=False, sliding_window=8), vocab_size=VOCABULARY)
    with pytest.raises(ConfigError, match="bloom cannot keep packed documents apart"):
        config = Config(model=ModelConfig(type="bloom", sizes=BASE_BLOOM), data=DataConfig(cross_documents=False))
        resolve_spec(config, vocab_size=VOCABULARY)


BASE_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}


def test_wrong_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str | Path, message: str, **more: Any) -> None:
        with pytest.raises(DataError, match=message) as caught:
            resolve_spec(Config(model=ModelConfig(path=str(path), **more), data=DataConfig(seq_len=8)), vocab_size=300)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    refused(tmp_path / "nothing", "no such folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(folder, "has no config.json")
    (folder / "config.json").write_text("{")
    (folder / "pytorch_model.bin").write_text("x")
    refused(folder, r"only pytorch_model\.bin, which is never loaded")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "has no weights")
    (folder / "model.safetensors").write_bytes(b"")
    refused(folder, "config.json cannot be used")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    refused(folder, "t5 is not a causal language model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 299}))
    refused(folder, "vocab_size=299: the tokenizer has 300 ids")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}))
    refused(folder, "quantised")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}})
    )
    refused(folder, r"set model\.trust_remote_code=true")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing", "the hub gave no model of that name")


def test_transformers_keeps_its_own_verbosity() -> None:
    before = transformers.utils.logging.get_verbosity()
    spec_of("llama")
    assert transformers.utils.logging.get_verbosity() == before


@pytest.mark.parametrize("trust", [False, True])
def test_only_trusted_code_is_fetched_from_the_hub(trust: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    from distllm.models.hf_folder import weights_folder

    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataError, match=r"no config\.json"):
        weights_folder("owner/name", trust=trust)
    assert ("*.py" in asked) == trust and "*.safetensors" in asked
