"""First numbers: a pure function of (seed, full name), as the family's rules say, with right buffers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distllm.config.errors import ConfigError, DistllmError
from distllm.config.schema import Config, DataConfig, ModelConfig, TaskConfig
from distllm.data.tokenizer import Roles
from distllm.models.build import initial_tensors, meta_model, reset_parameters, resolve_spec
from distllm.models.spec import ModelSpec
from tests.models.families import FAMILIES, spec_of


@pytest.mark.parametrize("kind", FAMILIES)
def test_same_names_buffers_and_spread_as_a_normally_built_model(kind: str) -> None:
    spec = spec_of(kind)
    tensors = dict(initial_tensors(spec, seed=1))
    model, meta = spec.build(), meta_model(spec)
    assert [n for n, _ in meta.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert set(tensors) == {n for n, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    for name, buffer in model.named_buffers():
        assert tensors[name].dtype == buffer.dtype and torch.equal(tensors[name], buffer), name
    for name, parameter in model.named_parameters():
        ours = tensors[name]
        assert ours.dtype == torch.float32 and ours.device.type == "cpu" and ours.shape == parameter.shape
        if parameter.std() == 0.0:
            assert torch.equal(ours, parameter), name
        elif parameter.numel() >= 200:
            # The sample deviation of n numbers has itself a relative deviation of 1/sqrt(2n); two of them, 5 sigma.
            assert (ours.std() / parameter.std()).item() == pytest.approx(1.0, abs=5 / math.sqrt(parameter.numel())), name


def test_spread_of_every_matrix_as_the_config_says() -> None:
    spec = spec_of("gpt2", n_embd=64, n_layer=3, initializer_range=0.05)
    for name, tensor in initial_tensors(spec, seed=1):
        if tensor.dim() == 2:
            depth_scaled = name.endswith("c_proj.weight")
            wanted = 0.05 / math.sqrt(2 * 3) if depth_scaled else 0.05
            assert tensor.std().item() == pytest.approx(wanted, rel=0.1), name
            assert tensor.mean().item() == pytest.approx(0.0, abs=wanted / 5), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_no_two_matrices_are_equal(kind: str) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in initial_tensors(spec_of(kind), seed=1):
        if tensor.dim() >= 2:
            for part in tensor.flatten(0, -3) if tensor.dim() > 2 else [tensor]:  # experts one by one
                key = tuple(part.flatten()[:16].tolist())
                assert key not in seen, f"{name} begins like {seen.get(key)}"
                seen[key] = name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_numbers_depend_on_seed_and_name_only(kind: str) -> None:
    spec = spec_of(kind)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = dict(initial_tensors(spec, seed=1))
    assert torch.equal(torch.get_rng_state(), state), "the global random state moved"
    torch.manual_seed(7)
    again = dict(initial_tensors(spec, seed=1))
    other = dict(initial_tensors(spec, seed=2))
    # Another cut: everything is one unit, or the blocks of a deeper model.
    whole = dict(initial_tensors(replace(spec, blocks=(str(spec.blocks[0].rpartition(".")[0]),)), seed=1))
    deeper = dict(initial_tensors(spec_of(kind, num_hidden_layers=3), seed=1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and torch.equal(tensor, whole[name]), name
        if not name.endswith("c_proj.weight"):
            assert torch.equal(tensor, deeper[name]), name
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other[name]), name


def test_one_block_in_memory_at_a_time() -> None:
    spec = spec_of("llama", num_hidden_layers=4)
    alive: list[int] = []

    def init(module: nn.Module) -> None:
        alive.append(sum(p.numel() for m in tracked for p in m.parameters(recurse=False) if p.device.type == "cpu"))
        spec.init(module)

    tracked: list[nn.Module] = []

    def build() -> nn.Module:
        model = spec.build()
        tracked[:] = list(model.modules())
        return model

    for _ in initial_tensors(replace(spec, build=build, init=init), seed=1):
        pass
    model = meta_model(spec)
    block = sum(p.numel() for p in model.get_submodule("model.layers.0").parameters())
    outside = sum(p.numel() for p in model.parameters()) - 4 * block
    assert max(alive) == max(block, outside)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_tied_weights_stay_tied(kind: str) -> None:
    spec = spec_of(kind, tie_word_embeddings=True)
    model = meta_model(spec)
    embedding, head = model.get_submodule(str(spec.embedding)), model.get_submodule(str(spec.head))
    assert head.weight is embedding.weight
    names = [name for name, _ in initial_tensors(spec, seed=1)]
    assert f"{spec.embedding}.weight" in names and f"{spec.head}.weight" not in names
    untied = meta_model(spec_of(kind, tie_word_embeddings=False))
    assert untied.get_submodule(str(spec.head)).weight is not untied.get_submodule(str(spec.embedding)).weight


class Scale(nn.Module):
    """A parameter and buffers, with a choice of mistakes."""

    def __init__(self, *, forget: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8))
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=False)
        self.register_buffer("factor", torch.tensor(2.5))
        self.forget = forget

    def reset_parameters(self) -> None:
        if not self.forget:
            nn.init.ones_(self.weight)


class Small(nn.Module):
    def __init__(self, *, forget: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.first = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), Scale(forget=forget)) for _ in range(2))
        self.second = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
        self.tail = nn.Parameter(torch.empty(3))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.tail)


def small_spec(**changes: Any) -> ModelSpec:
    values: dict[str, Any] = {"name": "small", "build": Small, "init": _init, "blocks": ("first", "second")}
    return ModelSpec(**(values | changes))


def _init(module: nn.Module) -> None:
    if isinstance(module, Small):
        nn.init.zeros_(module.tail)
    else:
        reset_parameters(module)


def test_an_own_module_takes_its_layers_own_rules() -> None:
    tensors = dict(initial_tensors(small_spec(), seed=1))
    model = Small()
    assert set(tensors) == {n for n, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    assert torch.equal(tensors["first.0.1.mask"], model.first[0][1].mask) and tensors["first.1.1.factor"] == 2.5
    assert tensors["first.0.0.weight"].abs().max() <= 1 / math.sqrt(8)
    assert not torch.equal(tensors["first.0.0.weight"], tensors["first.1.0.weight"])
    assert tensors["second.0.self_attn.in_proj_weight"].std() > 0.1
    assert torch.equal(tensors["tail"], torch.zeros(3))


def test_temporaries_are_seeded_too() -> None:
    def orthogonal(module: nn.Module) -> None:
        _init(module)
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
            nn.init.trunc_normal_(module.weight) if module.bias is None else None

    spec = small_spec(init=orthogonal)
    torch.manual_seed(1)
    first = dict(initial_tensors(spec, seed=1))
    torch.manual_seed(2)
    second = dict(initial_tensors(spec, seed=1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    weights = [first[f"first.{i}.0.weight"] for i in (0, 1)]
    torch.testing.assert_close(weights[0] @ weights[0].T, torch.eye(8))
    assert not torch.equal(weights[0], weights[1])


def test_a_forgotten_parameter_is_named() -> None:
    with pytest.raises(DistllmError, match=r"model small: first\.0\.1\.weight is not initialised; give its module"):
        list(initial_tensors(small_spec(build=lambda: Small(forget=True)), seed=1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"spec": "a:b", "sizes": {"hidden_size": 8}}, r"model\.sizes=.*: is for model\.type"),
        ({"type": "llama", "spec_args": {"hidden": 8}}, r"model\.spec_args=.*: is for model\.spec"),
        ({"spec": "nowhere"}, r"must be package\.module:function"),
        ({"spec": "distllm.nowhere:spec"}, r"no module distllm\.nowhere"),
        ({"spec": "distllm.models.ngram_mlp:nothing"}, "has no function nothing"),
        ({"spec": "distllm.models.ngram_mlp:spec", "spec_args": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"spec": "tests.models.test_build:not_a_spec"}, "returned a int, not a ModelSpec"),
        ({"spec": "tests.models.test_build:short_spec"}, "short takes at most 4"),
        ({"spec": "tests.models.test_build:narrow_spec"}, "vocab_size=5: the tokenizer has 300 ids"),
    ],
)
def test_wrong_specs(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_spec(Config(model=ModelConfig(**model)), vocab_size=300)
    assert "\n" not in str(caught.value)


def not_a_spec() -> ModelSpec:
    return 1  # type: ignore[return-value]


def promises_nothing(*, path: str):  # type: ignore[no-untyped-def]
    Path(path).touch()
    return small_spec()


@pytest.mark.parametrize("target", ["subprocess:run", "pathlib:Path", "os:mkdir", "tests.models.test_build:promises_nothing"])
def test_only_a_function_that_is_declared_to_return_a_spec_is_called(target: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    arguments = {"subprocess:run": {"args": ["touch", str(made)]}}.get(target, {"path": str(made)})
    with pytest.raises(ConfigError, match="must be a function that is declared to return a ModelSpec: def ") as caught:
        resolve_spec(Config(model=ModelConfig(spec=target, spec_args=arguments)), vocab_size=300)
    assert not made.exists() and "\n" not in str(caught.value)


def test_only_the_blocks_with_the_names_that_are_wanted_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("llama", num_hidden_layers=3)
    every = dict(initial_tensors(spec, seed=1))
    made: list[tuple[int, ...]] = []
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda size, *rest, **more: made.append(tuple(size)) or full(size, *rest, **more))
    name = "model.layers.1.mlp.up_proj.weight"
    some = dict(initial_tensors(spec, seed=1, names=[name]))
    assert list(some) == [name] and torch.equal(some[name], every[name])
    assert made.count(tuple(every[name].shape)) <= 2 < 6  # up and gate of one block of three
    assert set(dict(initial_tensors(spec, seed=1, names={"model.rotary_emb.inv_freq"}))) == {"model.rotary_emb.inv_freq"}


def taking_spec(*, vocab_size: int, seq_len: int, labels: int, pad_id: int, start_id: int) -> ModelSpec:
    return small_spec(name=f"{vocab_size} {seq_len} {labels} {pad_id} {start_id}")


def test_what_a_spec_function_is_given() -> None:
    task = TaskConfig(kind="classification")
    config = Config(model=ModelConfig(spec="tests.models.test_build:taking_spec"), task=task, data=DataConfig(seq_len=9))
    roles = Roles(eos=0, pad=6, begin=7, separator=0, mask=8)
    spec = resolve_spec(config, vocab_size=50, labels={"": 3}, roles=roles)
    assert (spec.name, spec.task, spec.pad_id, spec.decoder_start) == ("50 9 3 6 7", "classification", 6, None)
    with pytest.raises(ConfigError, match="missing a required argument: 'labels'"):
        resolve_spec(config, vocab_size=50, roles=roles)
    seq2seq = config.model_copy(update={"task": TaskConfig(kind="seq2seq")})
    given = resolve_spec(seq2seq, vocab_size=50, labels={"": 3}, roles=replace(roles, begin=None))
    assert (given.name, given.decoder_start) == ("50 9 3 6 6", 6)


def short_spec() -> ModelSpec:
    return small_spec(name="short", max_seq_len=4)


def narrow_spec() -> ModelSpec:
    return small_spec(vocab_size=5)


def test_a_build_that_is_not_legal_on_meta() -> None:
    def reads() -> nn.Module:
        return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(int(torch.ones(1).item()), 2)])})

    def stays() -> nn.Module:
        return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2, device="cpu")])})

    with pytest.raises(ConfigError, match="model small: cannot be built on the meta device"):
        meta_model(small_spec(build=reads))
    with pytest.raises(ConfigError, match=r"blocks\.0\.weight is made on cpu"):
        meta_model(small_spec(build=stays))
    with pytest.raises(ConfigError, match="the spec names third, elsewhere; not in the module"):
        meta_model(small_spec(blocks=("first", "third"), norm="elsewhere"))
