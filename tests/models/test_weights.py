"""Starting from a folder of safetensors: every tensor arrives, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import Config, DataConfig, ModelConfig
from distllm.models import weights
from distllm.models.build import initial_tensors, resolve_spec
from distllm.models.spec import ModelSpec
from tests.models.families import FAMILIES, VOCABULARY, filled, random_ids, spec_of


def saved(kind: str, folder: Path, **sizes: Any) -> Any:
    """A model written by transformers itself."""
    model = filled(spec_of(kind, **sizes))
    model.save_pretrained(folder)
    return model


def from_folder(folder: Path, **more: Any) -> ModelSpec:
    config = Config(model=ModelConfig(path=str(folder), **more), data=DataConfig(seq_len=16))
    return resolve_spec(config, vocab_size=VOCABULARY)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_folder_of_transformers_arrives_whole(kind: str, tmp_path: Path) -> None:
    source = saved(kind, tmp_path)
    spec = from_folder(tmp_path)
    assert spec.weights == tmp_path
    tensors = dict(initial_tensors(spec, seed=9))
    wanted = dict(source.named_parameters()) | dict(source.named_buffers())
    assert set(tensors) == set(wanted)
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        ids = random_ids(2, 16)
        assert torch.equal(filled(spec)(input_ids=ids).logits, source(input_ids=ids).logits)


def test_one_tensor_at_a_time_where_names_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("llama", tmp_path)
    monkeypatch.setattr(weights, "_converted", None)
    reads: list[str] = []
    read = weights._read
    monkeypatch.setattr(weights, "_read", lambda path, key, opened: reads.append(key) or read(path, key, opened))
    tensors = initial_tensors(from_folder(tmp_path), seed=1)
    next(tensors)
    assert len(reads) == 1


def test_half_precision_files_become_fp32(tmp_path: Path) -> None:
    saved("llama", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = dict(initial_tensors(from_folder(tmp_path), seed=1))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_checkpoint_of_the_base_model_and_its_old_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public gpt2 has names without `transformer.` and causal masks as tensors."""
    monkeypatch.setattr(weights, "_converted", None)
    source = saved("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    save_file(tensors, file, metadata={"format": "pt"})
    ours = dict(initial_tensors(from_folder(tmp_path), seed=1))
    assert all(torch.equal(ours[name], value) for name, value in source.named_parameters())


def test_sizes_change_a_loaded_config(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    assert from_folder(tmp_path, sizes={"resid_pdrop": 0.25}).hf_config.resid_pdrop == 0.25
    with pytest.raises(ConfigError, match=r"model\.sizes\.resid_drop: gpt2 has no such size; the nearest is resid_pdrop"):
        from_folder(tmp_path, sizes={"resid_drop": 0.25})


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if ".1." in n]:
        del tensors[name]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(64, 32)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(60, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"lacks model\.layers\.1\.input_layernorm\.weight, .* and 4 more; these are not the weights"),
        (_add, r"also has model\.layers\.2\.mlp\.up_proj\.weight; these"),
        (_reshape, r"does not fit: model\.layers\.1\.mlp\.up_proj\.weight has shape \[60, 32\], the run needs \[64, 32\]"),
    ],
)
def test_weights_of_another_model(change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path) -> None:
    saved("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=message) as caught:
        list(initial_tensors(from_folder(tmp_path), seed=1))
    assert "\n" not in str(caught.value)


def test_experts_that_are_missing(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight; these"):
        list(initial_tensors(from_folder(tmp_path), seed=1))


def test_a_tied_config_with_two_different_tensors(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    with pytest.raises(DataError, match=r"differ in the file; use model\.sizes\.tie_word_embeddings=false"):
        list(initial_tensors(from_folder(tmp_path, sizes={"tie_word_embeddings": True}), seed=1))


def test_torn_files(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors: is not a readable safetensors file"):
        list(initial_tensors(from_folder(tmp_path), seed=1))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(DataError, match=r"gone\.safetensors: is missing, though the index names it"):
        list(initial_tensors(from_folder(tmp_path), seed=1))
    index.write_text("[]")
    with pytest.raises(DataError, match="is not an index"):
        list(initial_tensors(from_folder(tmp_path), seed=1))


def test_an_own_module_reads_weights_too(tmp_path: Path) -> None:
    spec = resolve_spec(Config(model=ModelConfig(spec="distllm.models.ngram_mlp:spec")), vocab_size=300)
    tensors = dict(initial_tensors(spec, seed=1))
    save_file(tensors, tmp_path / "model.safetensors")
    again = dict(initial_tensors(replace(spec, weights=tmp_path), seed=2))
    assert set(again) == set(tensors) and all(torch.equal(again[name], tensors[name]) for name in tensors)
    tensors.pop("head.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"lacks head\.weight"):
        list(initial_tensors(replace(spec, weights=tmp_path), seed=2))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors"])
def test_an_index_that_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").touch()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(DataError, match="which is outside of the model folder"):
        weights.tensor_files(folder)
