"""Starting from weights with another head: the body arrives whole, and what is new or left over is told."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distllm.config.errors import DataError, StorageError
from distllm.config.schema import Config, DataConfig, HeadConfig, ModelConfig, TaskConfig
from distllm.models import weights
from distllm.models.build import initial_tensors, resolve_spec
from distllm.models.convert import convert
from distllm.models.spec import ModelSpec
from distllm.models.weights import LoadReport, load_report
from tests.models.families import filled
from tests.models.heads import ENCODER, ENCODERS, ROLES, VOCABULARY, folder_spec, head_config, head_spec


def saved(kind: str, task: str, folder: Path, *, seed: int = 7, **more: Any) -> nn.Module:
    """A model written by transformers itself."""
    model = filled(head_spec(kind, task, **more), seed=seed)
    model.save_pretrained(folder)
    return model


def report(spec: ModelSpec) -> LoadReport:
    found = load_report(spec)
    assert found is not None
    tensors = dict(initial_tensors(spec, seed=1))
    assert len(tensors) >= found.loaded + len(found.new)
    return found


NEW_CLASSIFIER = {
    "bert": ["bert.pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["classifier", "pre_classifier"],
    "electra": ["classifier.dense", "classifier.out_proj"],
    "albert": ["albert.pooler", "classifier"],
}


@pytest.mark.parametrize("kind", NEW_CLASSIFIER)
def test_a_classifier_from_a_masked_language_model(kind: str, tmp_path: Path) -> None:
    source = saved(kind, "masked_lm", tmp_path)
    spec = folder_spec(tmp_path, "classification")
    found = report(spec)
    assert sorted({name.rpartition(".")[0] for name in found.new}) == NEW_CLASSIFIER[kind]
    assert found.left_over and not any(name.startswith(f"{spec.base}.") for name in found.left_over)
    first, other = dict(initial_tensors(spec, seed=1)), dict(initial_tensors(spec, seed=2))
    body = {name: value for name, value in source.named_parameters() if name.startswith(f"{spec.base}.")}
    assert found.loaded == len(body) and all(torch.equal(first[name], value) for name, value in body.items())
    # The new ones are a pure function of seed and name, the same as in a model that starts from nothing.
    fresh = dict(initial_tensors(head_spec(kind, "classification"), seed=1))
    assert all(torch.equal(first[name], fresh[name]) for name in found.new)
    assert any(not torch.equal(first[name], other[name]) for name in found.new)


def test_a_masked_language_model_from_a_classifier(tmp_path: Path) -> None:
    saved("bert", "classification", tmp_path)
    found = report(folder_spec(tmp_path, "masked_lm"))
    assert [n for n in found.left_over if "pooler" not in n] == ["classifier.bias", "classifier.weight"]
    assert all(name.startswith("cls.predictions.") for name in found.new) and len(found.new) == 5


def test_a_head_of_another_size(tmp_path: Path) -> None:
    saved("bert", "classification", tmp_path)
    found = report(folder_spec(tmp_path, "classification", labels=2))
    assert found.new == (
        "classifier.weight has shape [3, 32], the run needs [2, 32]", "classifier.bias has shape [3], the run needs [2]",
    )  # fmt: skip
    assert found.left_over == ()
    assert report(folder_spec(tmp_path, "classification", labels=3)).new == ()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "bart", "t5", "gpt2"])
def test_the_body_alone_and_back(kind: str, tmp_path: Path) -> None:
    """Folders of AutoModel have names without the prefix, as sentence encoders do."""
    task = "seq2seq" if kind in ("bart", "t5") else "classification"
    source = saved(kind, task, tmp_path / "whole")
    body = source.model if kind == "bart" else source if kind == "t5" else getattr(source, source.base_model_prefix)
    body.save_pretrained(tmp_path / "alone")
    names = set(load_file(tmp_path / "alone" / "model.safetensors"))
    assert not any(name.startswith(f"{source.base_model_prefix}.") for name in names)
    spec = folder_spec(tmp_path / "alone", task)
    found = report(spec)
    assert all(name.split(".")[0] in ("classifier", "pre_classifier", "score") for name in found.new) and not found.left_over
    tensors, wanted = dict(initial_tensors(spec, seed=1)), dict(source.named_parameters())
    new = {text.split()[0] for text in found.new}
    assert all(torch.equal(tensors[name], value) for name, value in wanted.items() if name not in new)
    assert found.loaded + len(new) == len(weights.persistent_names(source)) - (kind == "bart")  # final_logits_bias
    if kind in ENCODERS:  # and a body alone reads a folder with a head
        config = Config(
            task=TaskConfig(kind="multi_task", tasks={"a": HeadConfig()}), model=ModelConfig(path=str(tmp_path / "whole"))
        )
        spec = resolve_spec(replace_seq(config), vocab_size=VOCABULARY, labels={"a": 2}, roles=ROLES)
        found = report(spec)
        assert found.loaded == len([n for n, _ in body.named_parameters() if "pooler" not in n])
        assert all(name.startswith("heads.") for name in found.new)


def replace_seq(config: Config) -> Config:
    return config.model_copy(update={"data": DataConfig(seq_len=16)})


def test_the_names_of_old_files(tmp_path: Path) -> None:
    """The public bert-base has LayerNorm.gamma and .beta, a next-sentence head, and positions as a tensor."""
    source = saved("bert", "masked_lm", tmp_path)
    file = tmp_path / "model.safetensors"
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for n, v in load_file(file).items()}  # fmt: skip
    assert any("gamma" in name for name in old)
    old |= {"cls.seq_relationship.weight": torch.ones(2, 32), "bert.embeddings.position_ids": torch.arange(16)[None]}
    save_file(old, file, metadata={"format": "pt"})
    found = report(folder_spec(tmp_path, "masked_lm"))
    assert found == LoadReport(len(list(source.named_parameters())), (), ("cls.seq_relationship.weight",))
    tensors = dict(initial_tensors(folder_spec(tmp_path, "masked_lm"), seed=1))
    assert all(torch.equal(tensors[name], value) for name, value in source.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bert.encoder.layer.1.output.dense.weight"), r"lacks bert\.encoder\.layer\.1\.output\.dense\.weight;"),
        (lambda t: t.update({"bert.encoder.layer.2.x": torch.ones(1)}), r"also has bert\.encoder\.layer\.2\.x;"),
        (lambda t: t.update({"bert.embeddings.word_embeddings.weight": torch.ones(9, 32)}), r"does not fit: .*\[9, 32\], the"),
    ],
)
def test_a_body_that_differs_is_no_start(change: Any, message: str, tmp_path: Path) -> None:
    saved("bert", "masked_lm", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = folder_spec(tmp_path, "classification")
    for load in (load_report, lambda s: list(initial_tensors(s, seed=1))):
        with pytest.raises(DataError, match=message) as caught:
            load(spec)
        assert "\n" not in str(caught.value)


def with_weights(folder: Path, *, vocab_size: int = VOCABULARY, **sizes: Any) -> ModelSpec:
    config = head_config("bert", "classification", model={"sizes": ENCODER | sizes, "weights": str(folder)})
    return resolve_spec(config, vocab_size=vocab_size, labels={"": 2}, roles=ROLES)


def test_weights_wherever_name_and_shape_agree(tmp_path: Path) -> None:
    source = saved("bert", "masked_lm", tmp_path)
    found = report(with_weights(tmp_path, num_hidden_layers=3))
    assert found.loaded == len([n for n, _ in source.named_parameters() if n.startswith("bert.")])
    assert {name.split(".")[3] for name in found.new if ".layer." in name} == {"2"}
    found = report(with_weights(tmp_path, num_hidden_layers=1, intermediate_size=48))
    assert any(name.startswith("bert.encoder.layer.1.") for name in found.left_over)
    assert "bert.encoder.layer.0.output.dense.weight has shape [32, 64], the run needs [32, 48]" in found.new


def test_weights_of_another_vocabulary_or_model(tmp_path: Path) -> None:
    saved("bert", "masked_lm", tmp_path / "bert")
    with pytest.raises(DataError, match=r"its vocabulary has 120 ids, the run's 150; use its tokenizer: data\.tokenizer\.kind"):
        load_report(with_weights(tmp_path / "bert", vocab_size=150))
    saved("distilbert", "masked_lm", tmp_path / "distilbert")
    assert report(with_weights(tmp_path / "distilbert")).loaded < 10  # embeddings have the same names
    save_file({"x": torch.ones(2)}, tmp_path / "bert" / "model.safetensors")
    with pytest.raises(DataError, match="none of its 1 tensors fits the model bert by name and shape"):
        load_report(with_weights(tmp_path / "bert"))
    with pytest.raises(DataError, match=r"^model\.weights=.*none: no such folder; nearest: the folder .*"):
        with_weights(tmp_path / "none")


def test_an_own_module_takes_what_fits(tmp_path: Path) -> None:
    def own(**more: Any) -> ModelSpec:
        return resolve_spec(Config(model=ModelConfig(spec="distllm.models.ngram_mlp:spec", **more)), vocab_size=300)

    tensors = dict(initial_tensors(own(), seed=1))
    save_file(tensors, tmp_path / "model.safetensors")  # no config.json: an export of such a module
    spec = own(weights=str(tmp_path), spec_args={"layers": 3})
    found = report(spec)
    assert found.loaded == len(tensors) and all(name.startswith("blocks.2.") for name in found.new)
    again = dict(initial_tensors(spec, seed=2))
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


def test_one_tensor_at_a_time_with_a_new_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("bert", "masked_lm", tmp_path)
    spec = folder_spec(tmp_path, "classification")
    some = dict(initial_tensors(spec, seed=1, names={"classifier.weight"}))
    assert list(some) == ["classifier.weight"]
    monkeypatch.setattr(weights, "_converted", None)
    assert "classifier.weight" in dict(initial_tensors(spec, seed=1))
    assert load_report(replace(spec, weights=None)) is None


def test_the_report_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("bert", "masked_lm", tmp_path)
    monkeypatch.setattr(weights, "_read", None)
    assert load_report(folder_spec(tmp_path, "classification"))


def test_pickles_are_converted_as_tensors_only(tmp_path: Path) -> None:
    source = saved("bert", "masked_lm", tmp_path / "source")
    tensors = {name: value for name, value in source.state_dict().items()}
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"convert it first: python -m distllm\.models\.convert .*source NEW_FOLDER"):
        folder_spec(tmp_path / "source", "classification")
    command = [sys.executable, "-m", "distllm.models.convert", str(tmp_path / "source"), str(tmp_path / "made")]
    assert subprocess.run(command, check=False, cwd=Path(__file__).parents[2]).returncode == 0
    assert report(folder_spec(tmp_path / "made", "masked_lm")).new == ()
    with pytest.raises(StorageError, match="exists already"):
        convert(tmp_path / "source", tmp_path / "made")
    with pytest.raises(DataError, match=r"has no pytorch_model\.bin"):
        convert(tmp_path / "made", tmp_path / "other")
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran"), protocol=2))
    with pytest.raises(DataError, match="holds more than tensors") as caught:
        convert(tmp_path / "source", tmp_path / "other")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "other").exists() and "\n" not in str(caught.value)


class Touch:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"state_dict": {"a": torch.ones(2)}, "step": 3}, "it has state_dict; save one of them alone"),
        (torch.ones(2), "it holds a Tensor"),
        ({"step": 3}, "it holds a dict"),
    ],
)
def test_a_pickle_without_tensors_by_name_becomes_no_folder(saved: object, told: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    torch.save(saved, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(DataError, match=f"pytorch_model.bin: holds no tensors by name: {told}$"):
        convert(tmp_path / "source", tmp_path / "made")
    assert not (tmp_path / "made").exists()
