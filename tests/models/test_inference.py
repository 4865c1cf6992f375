"""Loading for generation: on one device, or spread over memory and disk with the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from distllm.checkpoint.hf import export
from distllm.config.errors import DataError
from distllm.generate import Sampling, stream
from distllm.models import inference
from distllm.models.build import initial_tensors
from distllm.models.inference import load_for_inference
from tests.models.families import filled, random_ids, spec_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export of a tiny llama with a byte tokenizer."""
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "tokenizer")
    spec = spec_of("llama", num_hidden_layers=4, initializer_range=0.5)
    export(tmp_path / "model", tensors=initial_tensors(spec, seed=1), spec=spec, tokenizer_folder=tmp_path / "tokenizer")
    return tmp_path / "model"


def greedy(model: torch.nn.Module) -> torch.Tensor:
    tokens = stream(model, input_ids=random_ids(2, 5), sampling=Sampling(8, temperature=0.0))
    return torch.stack(list(tokens), dim=1)


def test_one_device(folder: Path) -> None:
    model, tokenizer = load_for_inference(folder, device="cpu")
    assert len(tokenizer) == 256 and not model.training and not hasattr(model, "hf_device_map")
    wanted = filled(spec_of("llama", num_hidden_layers=4, initializer_range=0.5))
    assert torch.equal(greedy(model), greedy(wanted))
    half, _ = load_for_inference(folder, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_model_larger_than_its_device_is_spread(folder: Path, tmp_path: Path) -> None:
    whole, _ = load_for_inference(folder, device="cpu")
    size = sum(p.numel() * 4 for p in whole.parameters())
    spread, _ = load_for_inference(
        folder, device="cpu", max_memory={"cpu": int(0.75 * size)}, offload_folder=tmp_path / "offload"
    )
    places = set(spread.hf_device_map.values())
    assert places == {"cpu", "disk"}
    assert torch.equal(greedy(spread), greedy(whole))


def test_it_spreads_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def watched(*args: object, **kwargs: object) -> object:
        asked.append(kwargs.get("device_map"))
        return load(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watched)
    load_for_inference(folder, device="cpu")
    monkeypatch.setattr(inference, "free_bytes", lambda device: 1000)
    load_for_inference(folder, device="cpu")
    assert asked == [None, "auto"]


def test_wrong_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_for_inference(tmp_path / "nothing", device="cpu")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataError, match="model: ") as caught:
        load_for_inference(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_memory_of_the_file_cache_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 80 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self: told)
    assert inference.free_bytes(torch.device("cpu")) == 80 * 1024
