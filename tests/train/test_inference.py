"""Evaluating, generating from and exporting what was trained."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from distllm import cli
from distllm.checkpoint.manifest import to_json
from distllm.comm import World
from distllm.config.errors import CheckpointError, ConfigError, DataError
from distllm.config.load import from_yaml, to_yaml
from distllm.config.schema import ModelConfig
from distllm.generate import Sampling
from distllm.models.spec import ModelSpec
from distllm.train.ensemble import open_ensemble
from distllm.train.evaluate_source import On, measure
from distllm.train.generate_source import generate_source
from distllm.train.inference import export_source, is_run, open_source
from tests.ranks import on_ranks
from tests.runs import metrics, run_tiny, tiny_config, words
from tests.train.tasks import task_config

ONE = World(0, 1, 0, 1, torch.device("cpu"))


def measured(source: Path, *texts: Path) -> Mapping[str, float]:
    return measure(open_ensemble([str(source)]), on=On(texts)).figures


def written(source: Path, *prompts: str, sampling: Sampling, seed: int = 1) -> list[str]:
    return list(generate_source(open_ensemble([str(source)]), prompts=prompts, sampling=sampling, seed=seed))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two sharded ranks: its checkpoints are in two files."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(folder, "layout.dp_shard=2", "train.steps=40", "checkpoint.every=20")
    assert on_ranks(lambda world: run_tiny(world, config), 2, folder / "ranks") == [0, 0]
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_source(str(trained), tmp_path_factory.mktemp("exported") / "model")


def test_a_run_evaluates_on_its_own_validation_data_as_it_did_in_training(trained: Path) -> None:
    logged = [line for line in metrics(trained) if "val_loss" in line][-1]
    found = measured(trained)
    assert found["val_tokens"] == logged["val_tokens"]
    assert found["val_loss"] == pytest.approx(logged["val_loss"], rel=1e-6)


def test_run_checkpoint_and_export_agree_on_a_text(trained: Path, exported: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(words(300, seed=99), encoding="utf-8")
    found = [measured(s, text) for s in (trained, trained / "checkpoints" / "step-40", exported)]
    assert found[0]["val_loss"] < math.log(256) and found[0]["val_tokens"] == len(text.read_bytes()) - 1
    for other in found[1:]:
        assert other["val_loss"] == pytest.approx(found[0]["val_loss"], rel=1e-6)
    assert found[0]["bits_per_byte"] == pytest.approx(found[0]["val_loss"] / math.log(2), rel=1e-2)
    assert measured(trained / "checkpoints" / "step-20", text)["val_loss"] > found[0]["val_loss"]


def test_run_and_export_write_the_same_text(trained: Path, exported: Path) -> None:
    texts = ["".join(written(s, "ab ", sampling=Sampling(20), seed=5)) for s in (trained, exported)]
    assert texts[0] == texts[1] and len(texts[0]) > 5
    assert "".join(written(trained, "ab ", sampling=Sampling(20), seed=6)) != texts[0]
    batch = written(trained, "ab ", "longer prompt", sampling=Sampling(5, temperature=0.0))
    greedy = Sampling(5, temperature=0.0)
    alone = ["".join(written(trained, p, sampling=greedy)) for p in ("ab ", "longer prompt")]
    assert batch == alone


def test_what_is_asked_is_cleaned_as_the_training_cleaned(
    trained: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = ("train.sample_prompts=['AB <b>CD</b>', 'ab cd']", "train.sample_temperature=0.0")
    config = tiny_config(tmp_path, "data.clean.lowercase=true", "data.clean.html=true", *sampled)
    assert run_tiny(ONE, config) == 0
    run, folder = tmp_path / "runs" / "tiny", tmp_path / "export"
    assert cli.run(["export", str(run), str(folder)]) == 0
    assert "cleaned  data.clean: lowercase=true, html=true; " in capsys.readouterr().out
    assert json.loads((folder / "distllm.json").read_text())["clean"] == {"lowercase": True, "html": True}
    assert "clean" not in json.loads((exported / "distllm.json").read_text())
    greedy, texts = Sampling(8, temperature=0.0), [tmp_path / "upper.txt", tmp_path / "lower.txt"]
    for text, change in zip(texts, (str.upper, str), strict=True):
        text.write_text(change(words(100, seed=99)), encoding="utf-8")
    for source in (run, run / "checkpoints" / "step-12", folder):
        assert written(source, "AB <b>CD</b>", sampling=greedy) == written(source, "ab cd", sampling=greedy)
        assert len(set(written(source, "AB <b>CD</b>", "ab cd", sampling=greedy))) == 1
        assert measured(source, texts[0]) == measured(source, texts[1])
    assert measured(trained, texts[0])["val_loss"] > measured(trained, texts[1])["val_loss"]  # it cleans nothing
    samples = (run / "samples.txt").read_text(encoding="utf-8").split("--- ")[1:]
    said = [sample.split("\n", 1)[1].removeprefix("AB <b>CD</b>").removeprefix("ab cd") for sample in samples]
    assert said[0::2] == said[1::2] and said
    marker = folder / "distllm.json"
    marker.write_text(marker.read_text().replace('"lowercase"', '"lowercsae"'))
    with pytest.raises(DataError, match=r"distllm\.json: damaged: `clean` must hold settings of data\.clean"):
        open_source(str(folder))


def test_a_run_of_conversations_samples_answers(tmp_path: Path) -> None:
    sampled = {"sample_tokens": 8, "sample_prompts": ["how are you", "two and two"], "sample_temperature": 0.0}
    assert run_tiny(ONE, task_config("sft", tmp_path, train={"micro_batch": 1, **sampled})) == 0
    run = tmp_path / "runs" / "small"
    answers = written(run, "how are you", "two and two", sampling=Sampling(8, temperature=0.0))
    assert (run / "samples.txt").read_text(encoding="utf-8") == "".join(
        f"--- step 4, prompt {prompt!r}\nUser: {prompt}\nAssistant:{answer}\n"
        for prompt, answer in zip(("how are you", "two and two"), answers, strict=True)
    )


def test_plain_transformers_loads_the_export_with_equal_logits(trained: Path, exported: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = torch.tensor([tokenizer("a few words")["input_ids"]])
    ours = open_source(str(trained)).model
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(input_ids=ids).logits)


def test_what_cannot_be_used_is_told_in_one_line(trained: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no validation data of its own; give a text file, --text FILE"):
        measured(exported)
    with pytest.raises(DataError, match="neither a run or checkpoint of distllm nor a model folder"):
        written(tmp_path, "a", sampling=Sampling(1))
    broken = tmp_path / "latin.txt"
    broken.write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(DataError, match=r"latin\.txt:2: not UTF-8 text"):
        measured(trained, broken)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        export_source(str(tmp_path), tmp_path / "out")


def own_run(trained: Path, target: Path, **model: object) -> Path:
    """A copy of a run whose checkpoint says that its model is another one."""
    shutil.copytree(trained, target)
    for file in (target / "config.yaml", *target.glob("checkpoints/*/config.yaml")):
        config = from_yaml(file.read_text())
        file.write_text(to_yaml(config.model_copy(update={"model": ModelConfig.model_validate(model)})))
    for step in target.glob("checkpoints/step-*"):  # as a forger would: the manifest agrees with the file
        raw = json.loads((step / "manifest.json").read_text())
        content = (step / "config.yaml").read_bytes()
        raw["files"]["config.yaml"] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        raw.pop("digest")
        raw["digest"] = hashlib.sha256(to_json(raw)).hexdigest()
        (step / "manifest.json").write_bytes(to_json(raw))
    return target


@pytest.mark.parametrize(
    "model",
    [
        {"spec": "tests.train.test_inference:planted", "spec_args": {"path": "here"}},
        {"path": "owner/name", "trust_remote_code": True},
    ],
)
def test_a_foreign_run_runs_no_code_of_its_own(
    model: dict[str, object], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = own_run(trained, tmp_path / "foreign", **model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("text")
    code = f"model.spec={model['spec']}" if "spec" in model else "model.trust_remote_code=true with model.path=owner/name"
    for command in (f"generate {run}", f"eval {run} --text t.txt", f"export {run} out", f"train {run}"):
        assert cli.run(command.split()) == 2
        err = capsys.readouterr().err
        assert f": its config runs code of its own ({code}); add --trust if you trust it\n" in err and err.count("\n") == 1
    assert not (tmp_path / "here").exists()
    if "spec" in model:
        assert cli.run(["generate", str(run), "--trust"]) == 2
        assert (tmp_path / "here").exists()


def planted(*, path: str) -> ModelSpec:
    Path(path).touch()
    raise ConfigError(["planted"])


def test_code_named_on_the_command_line_is_the_users_own(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("distllm.train_command.run_train", lambda loaded: seen.append(loaded.config.model.spec) or 0)
    own = ["model.type=null", "model.sizes={}", "model.spec=distllm.models.ngram_mlp:spec"]
    assert cli.run(["train", str(trained), "layout.dp_shard=1", *own]) == 0 and seen == ["distllm.models.ngram_mlp:spec"]


def test_which_folder_is_a_run(trained: Path, exported: Path, tmp_path: Path) -> None:
    step = trained / "checkpoints" / "step-40"
    assert all(is_run(path) for path in (trained, step, trained / "checkpoints"))
    theirs = tmp_path / "step-1000"
    shutil.copytree(exported, theirs)
    (theirs / "checkpoints").mkdir()
    assert not is_run(exported) and not is_run(theirs) and not is_run(tmp_path / "hub")
    (tmp_path / "step-7").mkdir()
    assert is_run(tmp_path / "step-7"), "a torn checkpoint is told as one"
    assert open_source(str(theirs)).name == str(theirs)


def test_a_run_needs_not_the_model_that_it_began_from_nor_its_kernel(trained: Path, exported: Path, tmp_path: Path) -> None:
    run = own_run(trained, tmp_path / "run", path=str(tmp_path / "gone"), attention="flash_attention_2")
    if not (run / "model_config").is_dir():
        (run / "model_config").mkdir()
        shutil.copy(exported / "config.json", run / "model_config")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        logits = [open_source(str(source)).model(input_ids=ids).logits for source in (run, trained)]
    assert torch.equal(*logits)
    out = export_source(str(run), tmp_path / "out")
    assert (out / "config.json").is_file() and (out / "generation_config.json").is_file()


def test_a_tokenizer_with_gaps_keeps_all_its_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from distllm.data.encode import load_encoder
    from distllm.data.tokenizer import id_count

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 40, "<|endoftext|>": 50}, unk_token="<|endoftext|>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    wrapped.save_pretrained(tmp_path)
    assert len(wrapped) == 3 and id_count(wrapped) == 51 == load_encoder(tmp_path).vocab_size


def test_what_accelerate_put_on_the_disk_lives_as_long_as_the_model(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distllm.train import inference

    asked: dict[str, Path] = {}
    load = inference.load_for_inference

    def watched(folder: Path, *, offload_folder: Path, **rest: object) -> object:
        asked.update(folder=Path(folder), offload=offload_folder)
        return load(folder, offload_folder=offload_folder, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(inference, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(inference, "load_for_inference", watched)
    opened = open_source(str(trained))
    assert asked["folder"].is_dir() and asked["offload"].parent == asked["folder"].parent
    with torch.no_grad():
        opened.model(input_ids=torch.tensor([[1, 2, 3]]))
