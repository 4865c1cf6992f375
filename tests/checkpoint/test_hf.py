"""Export: plain transformers loads it, with equal logits, and nothing that was there is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from distllm.checkpoint import hf
from distllm.checkpoint.hf import export
from distllm.config.errors import DataError, StorageError
from distllm.config.schema import Config, DataConfig, HeadConfig, ModelConfig, TaskConfig, TokenizerConfig
from distllm.data.tokenizer import make_tokenizer, roles_of
from distllm.models.build import initial_tensors, resolve_spec
from distllm.models.spec import ModelSpec
from tests.models.families import FAMILIES, VOCABULARY, filled, random_ids, spec_of
from tests.models.heads import CASES as HEADS
from tests.models.heads import LABELS, batch_of, head_config, head_spec


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer without merges, as an HF folder: 256 bytes and an end-of-document token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<|end|>": 256}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def exported(spec: ModelSpec, folder: Path, **more: Any) -> torch.nn.Module:
    """Export the spec's initial tensors and return the model that holds them."""
    arguments: dict[str, Any] = {"tensors": initial_tensors(spec, seed=1), "tokenizer_folder": None} | more
    export(folder, spec=spec, **arguments)
    return filled(spec)


TIED = [(kind, {"tie_word_embeddings": True}) for kind in ("llama", "qwen3", "mixtral")]
CASES = [(kind, {}) for kind in FAMILIES] + TIED


@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_plain_transformers_gives_equal_logits(kind: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(kind, **sizes)
    ours = exported(spec, tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = random_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert type(theirs).__name__ == spec.hf_config.architectures[0]
    assert theirs.config.use_cache and theirs.dtype == torch.float32
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, theirs.get_buffer(name)), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3_moe", "opt"])
def test_the_tensors_are_those_that_transformers_writes(kind: str, tmp_path: Path) -> None:
    """So that other tools, which know a family by its public names (experts one by one), read it too."""
    exported(spec_of(kind), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma2"])
def test_there_and_back_loses_nothing(kind: str, tmp_path: Path) -> None:
    spec = spec_of(kind)
    exported(spec, tmp_path / "out")
    again = resolve_spec(
        Config(model=ModelConfig(path=str(tmp_path / "out")), data=DataConfig(seq_len=16)), vocab_size=VOCABULARY
    )
    before, after = dict(initial_tensors(spec, seed=1)), dict(initial_tensors(again, seed=2))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_several_files_and_their_index(tmp_path: Path) -> None:
    spec = spec_of("llama")
    exported(spec, tmp_path / "one")
    exported(spec, tmp_path / "many", max_file_bytes=20_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    parts = {file.name: load_file(file) for file in files}
    assert {name: file for file, part in parts.items() for name in part} == index["weight_map"]
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    assert all(torch.equal(whole[name], parts[file][name]) for name, file in index["weight_map"].items())
    for part in parts.values():
        assert len(part) == 1 or sum(t.numel() * 4 for t in part.values()) <= 20_000


def test_one_file_of_tensors_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The iterator is drawn from while files are written, not emptied first."""
    spec, events = spec_of("llama"), []
    save = hf.save_file
    monkeypatch.setattr(hf, "save_file", lambda *a, **k: (events.append("file"), save(*a, **k)))

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for item in initial_tensors(spec, seed=1):
            events.append("tensor")
            yield item

    exported(spec, tmp_path / "out", tensors=watched(), max_file_bytes=20_000)
    assert events.index("file") < len(events) // 2


def test_half_precision(tmp_path: Path) -> None:
    exported(spec_of("llama"), tmp_path / "out", dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_tokenizer_and_its_special_ids_come_along(kind: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    exported(spec_of(kind), tmp_path / "out", tokenizer_folder=tokenizer_folder)
    ours = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n    return x + 1  # größer als 一\n"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.decode(theirs(text)["input_ids"]) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 256
    assert model.get_input_embeddings().padding_idx is None
    out = model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False, pad_token_id=256)
    assert out.shape[1] <= 5


def test_a_tokenizer_that_is_too_large(tmp_path: Path, tokenizer_folder: Path) -> None:
    spec = resolve_spec(Config(model=ModelConfig(type="gpt2", sizes=FAMILIES["gpt2"])), vocab_size=100)
    with pytest.raises(DataError, match="the tokenizer has 257 ids, the model only 100"):
        exported(spec, tmp_path / "out", tokenizer_folder=tokenizer_folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer"]


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    exported(spec_of("llama"), out)  # empty is fine
    (out / "stale").write_text("x")
    exported(spec_of("gpt2"), out)
    assert not (out / "stale").exists() and json.loads((out / "config.json").read_text())["model_type"] == "gpt2"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("dear")
    with pytest.raises(StorageError, match="is not empty and no earlier export"):
        exported(spec_of("llama"), other)
    with pytest.raises(StorageError, match="is a file"):
        exported(spec_of("llama"), other / "thesis.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"] and (other / "thesis.txt").read_text() == "dear"


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("llama")
    exported(spec, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(initial_tensors(spec, seed=2))[:5]
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="out: cannot be written: No space left on device"):
        exported(spec, tmp_path / "out", tensors=broken())
    with pytest.raises(AssertionError, match="lack"):
        exported(spec, tmp_path / "out", tensors=iter(list(initial_tensors(spec, seed=2))[:5]))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_own_module(tmp_path: Path) -> None:
    spec = resolve_spec(Config(model=ModelConfig(spec="distllm.models.ngram_mlp:spec")), vocab_size=300)
    exported(spec, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["distllm.json", "model.safetensors"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in initial_tensors(spec, seed=1))


AUTO = {
    "masked_lm": transformers.AutoModelForMaskedLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize(("kind", "task"), [*HEADS, ("bert", "regression")])
def test_plain_transformers_gives_equal_logits_from_every_head(kind: str, task: str, tmp_path: Path) -> None:
    spec = head_spec(kind, task, labels=1 if task == "regression" else LABELS)
    ours = exported(spec, tmp_path / "out")
    theirs, info = AUTO[task].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and type(theirs).__name__ == spec.hf_config.architectures[0]
    inputs = batch_of(task).inputs
    with torch.no_grad():
        assert torch.equal(theirs.eval()(**inputs).logits, ours(**inputs).logits)
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, theirs.get_buffer(name)), name
    assert (tmp_path / "out" / "generation_config.json").exists() == (task == "seq2seq")
    facts = json.loads((tmp_path / "out" / "distllm.json").read_text())
    assert (facts["task"], facts["base"]) == (task, spec.base)
    sizes = {"": 1 if task == "regression" else LABELS} if task in ("classification", "regression") else {}
    config = Config(
        task=TaskConfig(kind=task), model=ModelConfig(path=str(tmp_path / "out")), data=DataConfig(seq_len=16)  # type: ignore[arg-type]
    )
    again = resolve_spec(config, vocab_size=120, labels=sizes, roles=None)
    before, after = dict(initial_tensors(spec, seed=1)), dict(initial_tensors(again, seed=2))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def roles_folder(tmp_path: Path) -> Path:
    """A byte tokenizer with tokens for padding, beginning and mask."""
    make_tokenizer(TokenizerConfig(kind="bytes"), iter([]), tmp_path / "tokenizer", roles=True)
    return tmp_path / "tokenizer"


def fitted(kind: str, task: str, folder: Path, **more: Any) -> ModelSpec:
    """The spec of a family for the tokenizer of a folder."""
    roles = roles_of(transformers.AutoTokenizer.from_pretrained(folder))
    return resolve_spec(head_config(kind, task), vocab_size=260, labels={"": 2}, roles=roles, **more)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "gpt2"])
def test_a_classifier_and_its_tokenizer_work_in_plain_transformers(kind: str, tmp_path: Path, roles_folder: Path) -> None:
    spec = fitted(kind, "classification", roles_folder, label_names=("bad", "good"))
    ours = exported(spec, tmp_path / "out", tokenizer_folder=roles_folder)
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    (found,) = classify("fine")
    inputs = torch.tensor([[258, *b"fine", 256]])
    with torch.no_grad():
        wanted = ours(input_ids=inputs).logits.softmax(-1)[0]
    assert found["label"] == ("bad", "good")[int(wanted.argmax())] and found["score"] == pytest.approx(wanted.max().item())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    pair = tokenizer("a", "bc", return_tensors="pt")
    assert pair["input_ids"].tolist() == [[258, 97, 256, 98, 99, 256]]
    assert ("token_type_ids" in pair) == (kind in ("bert", "roberta"))
    if "token_type_ids" in pair:
        assert pair["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]
    with torch.no_grad():
        assert ours(**pair).logits.shape == (1, 2)


@pytest.mark.parametrize("kind", ["bart", "marian", "t5"])
def test_a_translator_generates_in_plain_transformers(kind: str, tmp_path: Path, roles_folder: Path) -> None:
    spec = fitted(kind, "seq2seq", roles_folder)
    ours = exported(spec, tmp_path / "out", tokenizer_folder=roles_folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    config = model.generation_config
    assert (config.decoder_start_token_id, config.pad_token_id, config.eos_token_id) == (258, 257, 256)
    assert config.max_length == (512 if kind == "t5" else 16)
    inputs = tokenizer("one two", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    out = model.generate(**inputs, num_beams=1, do_sample=False, max_length=6)
    ids = torch.tensor([[258]])
    with torch.no_grad():
        for _ in range(out.shape[1] - 1):
            logits = ours(**inputs, decoder_input_ids=ids).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out[:, :-1], ids[:, :-1])  # the last may be forced to be the end


def test_a_model_of_several_tasks_exports_its_body(tmp_path: Path) -> None:
    config = Config(
        task=TaskConfig(kind="multi_task", tasks={"a": HeadConfig(), "m": HeadConfig(kind="masked_lm")}),
        model=head_config("bert", "masked_lm").model, data=DataConfig(seq_len=16),
    )  # fmt: skip
    spec = resolve_spec(config, vocab_size=120, labels={"a": 2}, roles=None)
    ours = exported(spec, tmp_path / "out")
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"] and all(name.startswith("heads.") for name in info["unexpected_keys"])
    inputs = batch_of("classification").inputs
    with torch.no_grad():
        assert torch.equal(theirs.eval()(**inputs).last_hidden_state, ours.bert(**inputs).last_hidden_state)
