"""Which weights learn, how fast, and adapters: the same on every layout, saved and resumed to the bit, merged for export."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from distllm.checkpoint.hf import export
from distllm.checkpoint.manager import CheckpointManager
from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.config.schema import (
    ActivationConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    ScheduleConfig,
    TaskConfig,
    TuneConfig,
)
from distllm.data.batch import Batch
from distllm.data.tokenizer import Roles
from distllm.engine.native import NativeEngine
from distllm.models.build import initial_tensors, meta_model, resolve_spec
from distllm.models.spec import ModelSpec
from distllm.parallel.mesh import AXES, build_mesh
from distllm.parallel.parallelize import Layout, fill, parallelize
from distllm.train.objectives.classify import classification
from distllm.train.optim import make_optimizer
from distllm.train.schedule import make_schedule
from distllm.train.tune import (
    apply_tune,
    first_tensors,
    is_adapter,
    learning_rate_scales,
    merged,
    trainable_names,
    tuned_spec,
)
from tests.ranks import on_ranks
from tests.toy import Toy, toy_spec

ONE = World(0, 1, 0, 1, torch.device("cpu"))
VOCAB = 60
SMALL = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TUNES: dict[str, TuneConfig] = {
    "all": TuneConfig(),
    "head": TuneConfig(train="head"),
    "top": TuneConfig(train="top", top_blocks=1, layer_decay=0.5),
    "lora": TuneConfig(train="lora", lora=LoraConfig(rank=2, targets=["query", "value"])),
}


def spec_of(kind: str = "bert", task: Any = "classification", **sizes: Any) -> ModelSpec:
    config = Config(
        task=TaskConfig(kind=task), model=ModelConfig(type=kind, sizes=sizes or SMALL, dropout=0.0), data=DataConfig(seq_len=8)
    )
    labels = {"": 3} if task == "classification" else {}
    roles = Roles(eos=0, pad=1, begin=2, separator=0, mask=3)
    return resolve_spec(config, vocab_size=VOCAB, labels=labels, roles=roles)


BERT = spec_of()
BART = spec_of(
    "bart", "seq2seq", d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Which learn, and how fast


def test_the_head_is_what_the_task_adds_and_the_pooler() -> None:
    names = trainable_names(meta_model(BERT), BERT, TUNES["head"])
    assert {name.rpartition(".")[0] for name in names} == {"classifier", "bert.pooler.dense"}


def test_top_is_the_head_and_the_last_blocks() -> None:
    names = trainable_names(meta_model(BERT), BERT, TuneConfig(train="top", top_blocks=2))
    blocks = {name.split(".")[3] for name in names if name.startswith("bert.encoder.layer.")}
    assert blocks == {"1", "2"} and {"classifier.weight", "bert.pooler.dense.weight"} < names
    assert not any("embeddings" in name for name in names)


def test_top_of_an_encoder_decoder_is_the_end_of_both() -> None:
    names = trainable_names(meta_model(BART), BART, TuneConfig(train="top"))
    assert {".".join(name.split(".")[1:4]) for name in names} == {"encoder.layers.1", "decoder.layers.1"}


def test_top_takes_the_norm_below_the_head() -> None:
    spec = spec_of("llama", "causal_lm", **SMALL)
    assert {"model.norm.weight", "lm_head.weight"} < trainable_names(meta_model(spec), spec, TuneConfig(train="top"))


def test_a_tied_head_has_nothing_to_learn_alone() -> None:
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(ConfigError, match=r"tune\.train=head: the head of toy is its embedding; nearest: top"):
        trainable_names(model, toy_spec(), TUNES["head"])


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tune\.top_blocks=4: bert has 3 blocks; nearest: tune\.train=all"):
        trainable_names(meta_model(BERT), BERT, TuneConfig(train="top", top_blocks=4))


def test_what_the_module_froze_itself_stays_frozen() -> None:
    model = meta_model(BERT)
    model.get_parameter("bert.encoder.layer.2.output.dense.bias").requires_grad_(False)
    for tune in (TUNES["all"], TUNES["top"]):
        assert "bert.encoder.layer.2.output.dense.bias" not in trainable_names(model, BERT, tune)


def test_the_rate_decays_a_block_at_a_time() -> None:
    scales = learning_rate_scales(meta_model(BERT), BERT, TuneConfig(layer_decay=0.5))
    assert scales is not None
    layers = [scales[f"bert.encoder.layer.{i}.output.dense.weight"] for i in range(3)]
    assert layers == [0.125, 0.25, 0.5]
    assert scales["classifier.bias"] == scales["bert.pooler.dense.weight"] == 1.0
    assert scales["bert.embeddings.LayerNorm.weight"] == scales["bert.embeddings.word_embeddings.weight"] == 0.0625


def test_tables_learn_at_a_rate_of_their_own() -> None:
    assert learning_rate_scales(meta_model(BERT), BERT, TuneConfig()) is None
    scales = learning_rate_scales(meta_model(BERT), BERT, TuneConfig(embedding_rate=4.0))
    tables = {f"bert.embeddings.{what}_embeddings.weight" for what in ("word", "position", "token_type")}
    assert {name for name, scale in (scales or {}).items() if scale == 4.0} == tables
    both = learning_rate_scales(meta_model(BERT), BERT, TuneConfig(embedding_rate=4.0, layer_decay=0.5))
    assert both is not None and both["bert.embeddings.word_embeddings.weight"] == 0.25
    assert both["bert.embeddings.LayerNorm.weight"] == 0.0625 and both["classifier.bias"] == 1.0


def test_encoder_and_decoder_decay_alike() -> None:
    scales = learning_rate_scales(meta_model(BART), BART, TuneConfig(layer_decay=0.5))
    assert scales is not None
    for side in ("encoder", "decoder"):
        assert [scales[f"model.{side}.layers.{i}.fc1.weight"] for i in range(2)] == [0.25, 0.5]
    assert scales["model.shared.weight"] == scales["model.decoder.layernorm_embedding.weight"] == 0.125


# ---------------------------------------------------------------------------------------------------------------------
# Training


def batch_of(ids: range) -> Batch:
    rows, mask, labels = [], [], []
    for i in ids:
        generator = torch.Generator().manual_seed(i)
        rows.append(torch.randint(4, VOCAB, (8,), generator=generator))
        mask.append((torch.arange(8) < 2 + i % 7).long())
        labels.append(i % 3)
    inputs = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(mask)}
    return Batch(inputs, {"labels": torch.tensor(labels)}, tuple(ids))


def engine_of(world: World, tune: TuneConfig, *, spec: ModelSpec = BERT, activation: Any = "none", **axes: int) -> NativeEngine:
    mesh = build_mesh(world, sizes=dict.fromkeys(AXES, 1) | axes)
    tuned = tuned_spec(spec, tune)
    model = meta_model(tuned)
    apply_tune(model, tuned, tune)
    parallel = parallelize(
        model, mesh, spec=tuned, tensors=first_tensors(spec, tuned, seed=1), device=world.device,
        layout=Layout(activation=ActivationConfig(mode=activation)),
    )  # fmt: skip
    optim = OptimConfig(lr=1e-2, weight_decay=0.01)
    scales = learning_rate_scales(model, tuned, tune)
    return NativeEngine(
        parallel, objective=classification, schedule=make_schedule(ScheduleConfig(warmup=0), peak=optim.lr, steps=20),
        optimizer=make_optimizer(optim, model=model, device=world.device, scales=scales), clip=0.5, penalty=None,
        precision=PrecisionConfig(), device=world.device, rank=world.rank,
    )  # fmt: skip


def steps(engine: NativeEngine, numbers: range) -> list[float]:
    losses = []
    for step in numbers:
        size = 4 // engine.parallel.mesh.dp_size
        starts = [8 * step + 4 * a + engine.parallel.mesh.dp_rank * size for a in range(2)]
        batches = [batch_of(range(start, start + size)) for start in starts]
        losses.append(float(engine.train_step(batches, samples=range(8 * step, 8 * step + 8)).loss))
    return losses


def weights(engine: NativeEngine) -> dict[str, Any]:
    return {name: tensor.numpy().copy() for name, tensor in engine.full_tensors()}


@pytest.mark.parametrize("name", ["head", "top", "lora"])
def test_every_layout_tunes_the_same(name: str, tmp_path: Path) -> None:
    tune = TUNES[name]

    def run(axes: dict[str, int], activation: str = "none") -> Any:
        def rank(world: World) -> tuple[list[float], dict[str, Any], set[str]]:
            engine = engine_of(world, tune, activation=activation, **axes)
            before = weights(engine)
            losses, after = steps(engine, range(3)), weights(engine)
            moved = {key for key in after if world.is_main and (after[key] != before[key]).any()}
            states = {n.removeprefix("optim.").rpartition(".")[0] for n in engine.state() if n.startswith("optim.")}
            assert states == set(engine.parameters.local)
            assert engine.unused == ()
            return losses, after, moved

        return on_ranks(rank, max(axes.values(), default=1), tmp_path)[0]

    losses, after, moved = run({})
    tuned = tuned_spec(BERT, tune)
    assert moved == trainable_names(meta_model(tuned), tuned, tune)
    for axes, activation in (({"dp_replicate": 2}, "none"), ({"dp_shard": 2}, "full")):
        others, weights_there, moved_there = run(axes, activation)
        assert others == pytest.approx(losses, rel=1e-5) and moved_there == moved
        assert max(abs(weights_there[key] - after[key]).max() for key in after) < 2e-5


@pytest.mark.parametrize("tune", [TuneConfig(layer_decay=0.5), TuneConfig(embedding_rate=4.0)], ids=["decay", "tables"])
def test_a_scaled_rate_scales_the_update(tune: TuneConfig) -> None:
    moved: list[dict[str, torch.Tensor]] = []
    for config in (TuneConfig(), tune):
        engine = engine_of(ONE, config)
        before = {name: tensor.clone() for name, tensor in engine.full_tensors()}
        steps(engine, range(1))
        moved.append({name: tensor - before[name] for name, tensor in engine.full_tensors()})
    scales = learning_rate_scales(meta_model(BERT), BERT, tune)
    assert scales is not None
    for name, scale in scales.items():
        torch.testing.assert_close(moved[1][name], scale * moved[0][name], atol=1e-7, rtol=1e-3)


def saved(world: World, folder: Path, tune: TuneConfig, axes: dict[str, int]) -> NativeEngine:
    engine = engine_of(world, tune, **axes)
    steps(engine, range(2))
    kept = CheckpointManager(folder, config=CheckpointConfig(), world=world, attempt="a", logger=logging.getLogger("test"))
    kept.save(
        2, engine.state(), facts=engine.facts(), rng={}, layout=dict(engine.parallel.mesh.sizes), config_yaml="", config_digest=""
    )
    kept.wait()
    return engine


def loaded(world: World, folder: Path, tune: TuneConfig, axes: dict[str, int]) -> NativeEngine:
    engine = engine_of(world, tune, **axes)
    kept = CheckpointManager(
        folder.with_name("other"), config=CheckpointConfig(), world=world, attempt="b", logger=logging.getLogger("test")
    )
    found = kept.find(folder / "step-2")
    engine.restore(found.manifest.facts)
    kept.load(found, engine.state(), layout={})
    return engine


@pytest.mark.parametrize(("name", "axes"), [("top", {"dp_replicate": 2}), ("lora", {"dp_shard": 2})], ids=str)
def test_it_resumes_to_the_bit(name: str, axes: dict[str, int], tmp_path: Path) -> None:
    folder, tune = tmp_path / "run" / "checkpoints", TUNES[name]

    def write(world: World) -> Any:
        engine = saved(world, folder, tune, axes)
        return steps(engine, range(2, 4)), weights(engine)

    def read(world: World) -> Any:
        engine = loaded(world, folder, tune, axes)
        return steps(engine, range(2, 4)), weights(engine)

    ranks = max(axes.values(), default=1)
    (losses, first), (again, second) = on_ranks(write, ranks, tmp_path)[0], on_ranks(read, ranks, tmp_path)[0]
    assert again == losses and all((second[key] == first[key]).all() for key in first)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def noisy(tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors as after training: the adapters' products are not zero."""
    generator = torch.Generator().manual_seed(0)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) if is_adapter(n) else t for n, t in tensors}


def model_of(spec: ModelSpec, tensors: dict[str, torch.Tensor]) -> nn.Module:
    model = meta_model(spec)
    fill(model, tensors.items(), device=torch.device("cpu"))
    return model.eval()


def test_an_adapted_model_begins_as_the_plain_one() -> None:
    tuned = tuned_spec(BERT, TUNES["lora"])
    first, plain = dict(first_tensors(BERT, tuned, seed=1)), dict(initial_tensors(BERT, seed=1))
    inputs = batch_of(range(4)).inputs
    with torch.no_grad():
        ours, theirs = model_of(tuned, first)(**inputs).logits, model_of(BERT, plain)(**inputs).logits
    assert torch.equal(ours, theirs)
    down = [first[name] for name in sorted(first) if "lora_A" in name]
    assert len(down) == 6 and all(0 < t.abs().max() <= 16**-0.5 for t in down)
    other = dict(first_tensors(BERT, tuned, seed=2))
    down.append(other[min(name for name in other if "lora_A" in name)])
    assert not any(torch.equal(down[0], another) for another in down[1:])


def test_the_numbers_are_peft_s_own() -> None:
    config = TUNES["lora"]
    tuned = tuned_spec(BERT, config)
    first = noisy(first_tensors(BERT, tuned, seed=1))
    key = "bert.encoder.layer.1.attention.self.query"
    plain = dict(merged(iter(first.items()), BERT, config))
    product = first[f"{key}.lora_B.default.weight"] @ first[f"{key}.lora_A.default.weight"] * (16.0 / 2)
    torch.testing.assert_close(plain[f"{key}.weight"], first[f"{key}.base_layer.weight"] + product)


@pytest.mark.parametrize(
    "spec", [BERT, spec_of("gpt2", "causal_lm", n_embd=16, n_layer=2, n_head=2)], ids=lambda spec: spec.name
)
def test_merged_adapters_answer_as_adapters_do(spec: ModelSpec) -> None:
    config = TuneConfig(train="lora", lora=LoraConfig(rank=2, dropout=0.5))
    tuned = tuned_spec(spec, config)
    first = noisy(first_tensors(spec, tuned, seed=1))
    backwards = dict(merged(iter(reversed(first.items())), spec, config))
    inputs = {"input_ids": batch_of(range(4)).inputs["input_ids"]}
    with torch.no_grad():
        ours, theirs = model_of(tuned, first)(**inputs).logits, model_of(spec, backwards)(**inputs).logits
        start = model_of(spec, dict(initial_tensors(spec, seed=1)))(**inputs).logits
    torch.testing.assert_close(theirs, ours)
    assert (start - ours).abs().max() > 1e-3


def test_adapters_start_from_a_folder_and_are_exported_into_one(tmp_path: Path) -> None:
    import transformers

    export(tmp_path / "base", tensors=initial_tensors(BERT, seed=7), spec=BERT, tokenizer_folder=None)
    spec, config = replace(BERT, weights=tmp_path / "base"), TUNES["lora"]
    tuned = tuned_spec(spec, config)
    first = noisy(first_tensors(spec, tuned, seed=1))
    base = dict(initial_tensors(BERT, seed=7))
    name = "bert.encoder.layer.0.attention.self.query"
    assert torch.equal(first[f"{name}.base_layer.weight"], base[f"{name}.weight"])
    assert torch.equal(first["bert.embeddings.word_embeddings.weight"], base["bert.embeddings.word_embeddings.weight"])
    export(tmp_path / "tuned", tensors=merged(iter(first.items()), spec, config), spec=spec, tokenizer_folder=None)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()
    inputs = batch_of(range(4)).inputs
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, model_of(tuned, first)(**inputs).logits)


def test_the_head_of_a_classifier_learns_beside_the_adapters() -> None:
    tuned = tuned_spec(BERT, TUNES["lora"])
    names = trainable_names(meta_model(tuned), tuned, TUNES["lora"])
    assert {n for n in names if not is_adapter(n)} == trainable_names(meta_model(BERT), BERT, TUNES["head"])
    llama = spec_of("llama", "causal_lm", **SMALL)
    config = TuneConfig(train="lora")
    adapted = tuned_spec(llama, config)
    assert all(is_adapter(n) for n in trainable_names(meta_model(adapted), adapted, config))


def test_without_targets_attention_is_adapted() -> None:
    tuned = tuned_spec(BERT, TuneConfig(train="lora"))
    adapters = [name for name, _ in meta_model(tuned).named_parameters() if is_adapter(name)]
    adapted = {name.split("layer.0.")[1].partition(".lora_")[0] for name in adapters if "layer.0" in name}
    assert adapted == {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"}


@pytest.mark.parametrize(
    ("spec", "targets", "told"),
    [
        (BERT, ["q_proj", "query"], r"tune\.lora\.targets=q_proj: no such linear layer; bert has dense, key, query, value"),
        (toy_spec(), ["head"], r"tune\.lora\.targets=head: no such linear layer; toy has down, up"),
        (toy_spec(), [], r"tune\.lora\.targets: empty, and no layer has attention in its name; toy has down, up"),
    ],
)
def test_targets_that_do_not_exist_are_told(spec: ModelSpec, targets: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tuned_spec(spec, TuneConfig(train="lora", lora=LoraConfig(targets=targets)))


def test_a_module_of_ones_own_is_adapted_too() -> None:
    spec = replace(toy_spec(), init=lambda module: getattr(module, "reset_parameters", lambda: None)())
    tuned = tuned_spec(spec, TuneConfig(train="lora", lora=LoraConfig(rank=2, targets=["up"])))
    adapters = [n for n, p in meta_model(tuned).named_parameters() if is_adapter(n)]
    assert len(adapters) == 6 and isinstance(meta_model(tuned).get_submodule("layers.0.up"), peft.tuners.lora.LoraLayer)
