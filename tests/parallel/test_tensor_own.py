"""Tensor parallel of a module of the user's own, by its spec alone; and what cannot be cut is told in one clear line."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.models.build import meta_model, reset_parameters
from distllm.models.spec import ModelSpec
from distllm.models.tp_plans import tp_plan
from distllm.parallel.loss import is_cut_logits
from distllm.parallel.tensor import whole_logits
from distllm.parallel.tensor_check import can_cut_sequence, tp_problems
from distllm.train.objectives import causal_lm
from tests.models.families import spec_of
from tests.parallel.tensor_cases import Case, assert_close, causal_batch, enlarged, laid_out, parallel_answer, reference
from tests.ranks import on_ranks
from tests.toy import VOCAB, Toy, toy_spec

WIDTH, HEADS = 24, 4


class Attention(nn.Module):
    """As many write it: one projection for all three, and heads counted by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, self.n_head, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class Feed(nn.Module):
    """Of a width that ranks do not share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 31)
        self.down = nn.Linear(31, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.feed = Attention(), Feed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        return x + self.feed(self.second(x))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


PLAN = {
    "embed": "embedding_rowwise", "head": "colwise", "layers.*.attention.qkv": "qkv_colwise",
    "layers.*.attention.out": "rowwise", "layers.*.feed.up": "colwise", "layers.*.feed.down": "rowwise",
}  # fmt: skip
OWN = ModelSpec(
    name="own", build=Own, init=reset_parameters, blocks=("layers",), embedding="embed", norm="norm", head="head", tp_plan=PLAN
)
TOY_PLAN = {"embed": "embedding_rowwise", "head": "colwise", "layers.*.up": "colwise", "layers.*.down": "rowwise"}
TOY = replace(toy_spec(), init=reset_parameters, tp_plan=TOY_PLAN)


def own_case(spec: ModelSpec) -> Case:
    batches = [causal_batch(2, 8, seed=seed, vocabulary=VOCAB) for seed in (0, 1)]
    tensors = dict(enlarged(spec)) | ({"scale": torch.ones(1)} if spec.name == "toy" else {})
    return Case(spec, tensors, batches, causal_lm).to(torch.float64)


@pytest.mark.parametrize(("spec", "size", "sequence"), [(OWN, 2, False), (OWN, 4, True), (TOY, 2, False), (TOY, 4, False)])
def test_an_own_module_by_its_spec(spec: ModelSpec, size: int, sequence: bool, tmp_path: Path) -> None:
    """Tied, packed, with 37 tokens and 31 features that the ranks do not share evenly."""
    case = own_case(spec)
    wanted = on_ranks(lambda world: reference(case), 1, tmp_path)[0]
    for answer in on_ranks(lambda world: parallel_answer(case, world, tp=size, sequence=sequence), size, tmp_path):
        assert_close(answer, wanted, bound=1e-12)


def test_evaluation_takes_any_length_and_gathers_logits_where_asked(tmp_path: Path) -> None:
    case = own_case(OWN)
    ids = causal_batch(2, 5, seed=3, vocabulary=VOCAB).inputs["input_ids"]  # 5 tokens: 2 ranks cannot share them
    plain = Own().double()
    plain.load_state_dict(dict(case.tensors) | {"head.weight": case.tensors["embed.weight"]})

    def rank(world: World) -> Any:
        gathers, _, _ = laid_out(case, world, tp=2, sequence=True, loss_parallel=False)
        cut, _, _ = laid_out(case, world, tp=2, sequence=True)
        with torch.no_grad():
            logits = gathers.eval()(input_ids=ids)
            assert is_cut_logits(cut.eval()(input_ids=ids))
            with whole_logits(cut):
                assert torch.equal(cut(input_ids=ids), logits)
            assert is_cut_logits(cut(input_ids=ids))
        return logits.numpy()

    with torch.no_grad():
        wanted = plain(input_ids=ids)
    for logits in on_ranks(rank, 2, tmp_path):
        torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-12, atol=1e-12)


class StandIn(nn.Module):
    """Where another stage's module is: gives what was received, or its input on; may hold a tied parameter."""

    def __init__(self, received: torch.Tensor | None, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.received = received
        if tied is not None:
            self.weight = tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.received is None else self.received


@pytest.mark.parametrize("sequence", [False, True])
def test_pipeline_stages_are_cut_as_the_whole_is(sequence: bool, tmp_path: Path) -> None:
    """Stand-ins stay as they are; the first and last block that a stage has take and give whole hidden states."""
    case = own_case(OWN)
    ids = causal_batch(2, 8, seed=3, vocabulary=VOCAB).inputs["input_ids"]
    tensors = dict(case.tensors)

    def first() -> Own:
        model = Own()
        model.layers[1], model.norm, model.head = StandIn(None), StandIn(None), StandIn(None)  # type: ignore[assignment]
        return model

    def second(received: torch.Tensor) -> Own:
        model = Own()
        model.layers[0], model.embed = StandIn(None), StandIn(received, model.embed.weight)  # type: ignore[assignment]
        return model

    def rank(world: World) -> Any:
        hidden: torch.Tensor | None = None
        found = []
        for number in range(2):
            build = first if hidden is None else partial(second, hidden.detach())
            names = {n for n, _ in build().named_parameters()}
            stage = replace(case, spec=replace(OWN, build=build), tensors={n: t for n, t in tensors.items() if n in names})
            model, _, _ = laid_out(stage, world, tp=world.size, sequence=sequence, loss_parallel=False)
            if number:
                model.embed.received = hidden.detach()  # type: ignore[union-attr]  # it was on meta
            hidden = model.train()(input_ids=ids)
            hidden.sum().backward()
            assert all(p.grad is not None for p in model.parameters())
            found.append(hidden.detach().numpy())
        return found

    plain = Own().double()
    plain.load_state_dict(tensors | {"head.weight": tensors["embed.weight"]})
    with torch.no_grad():
        wanted = [plain.layers[0](plain.embed(ids)), plain(input_ids=ids)]
    for found in on_ranks(rank, 2, tmp_path):
        for value, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(value), right, rtol=1e-12, atol=1e-12)


def problems(spec: ModelSpec, size: int) -> list[str]:
    return tp_problems(meta_model(spec), spec=spec, size=size)


def with_plan(**changes: str) -> ModelSpec:
    return replace(OWN, tp_plan=PLAN | changes)


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        (replace(OWN, tp_plan={}), 2, r"layout\.tp=2: own has no tensor-parallel plan .*; nearest: layout\.tp=1"),
        (with_plan(**{"layers.*.feed.upp": "colwise"}), 2, r"layers\.\*\.feed\.upp: matches no module or parameter .*feed\.up"),
        (with_plan(**{"layers.*.feed.up": "columnwise"}), 2, r"layers\.0\.feed\.up=columnwise: is no style .*nearest: colwise"),
        (with_plan(norm="colwise"), 2, r"tp_plan: norm=colwise: is a LayerNorm and not a linear layer; nearest: replicate"),
        (with_plan(norm="embedding_rowwise"), 2, r"norm=embedding_rowwise: is a LayerNorm and not an embedding; nearest"),
        (OWN, 3, r"tp=3: layers\.0\.attention has 4 attention heads, which 3 ranks cannot share evenly; .*tp=2"),
        (OWN, 5, r"layout\.tp=5: .*4 attention heads.*; nearest: layout\.tp=4"),
        (TOY, 36, r"layout\.tp=36: embed has 37 features, too few for 36 ranks; nearest: layout\.tp=8"),
        (spec_of("llama"), 8, r"layout\.tp=8: model\.layers\.0\.self_attn has 4 attention heads and 2 of keys and values.*tp=4"),
        (spec_of("mixtral", intermediate_size=66), 4, r"experts\.gate_up_proj has 66 features, which 4 does not divide; .*tp=2"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_told(spec: ModelSpec, size: int, message: str) -> None:
    (found,) = problems(spec, size)[:1]
    assert re.search(message, found), found
    assert "\n" not in found


def test_what_can_be_cut_has_no_problems() -> None:
    assert problems(OWN, 4) == problems(TOY, 4) == problems(spec_of("llama"), 4) == problems(spec_of("gpt2"), 2) == []
    assert problems(replace(OWN, tp_plan={}), 1) == []


def test_sequences_are_cut_where_the_plan_has_every_layer() -> None:
    assert can_cut_sequence(meta_model(OWN), spec=OWN)
    assert not can_cut_sequence(meta_model(TOY), spec=TOY)  # its MLP stands in the block itself, beside the residual
    for kind in ("llama", "qwen3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"):
        assert can_cut_sequence(meta_model(spec_of(kind)), spec=spec_of(kind)), kind


def test_half_a_tied_parameter_and_a_sequence_that_does_not_divide(tmp_path: Path) -> None:
    half = {name: style for name, style in PLAN.items() if name != "embed"}
    case = own_case(replace(OWN, tp_plan=half))

    def tied(world: World) -> str:
        with pytest.raises(ConfigError) as caught:
            laid_out(case, world, tp=2)
        return str(caught.value)

    message = "tp_plan: embed shares a parameter that the plan cuts elsewhere; nearest: give embed a style too"
    assert on_ranks(tied, 2, tmp_path) == [message] * 2
    whole = own_case(OWN)

    def odd(world: World) -> list[str]:
        model, _, _ = laid_out(whole, world, tp=2, sequence=True)
        with pytest.raises(ConfigError) as caught:
            model.train()(input_ids=torch.zeros(1, 7, dtype=torch.int64))
        with pytest.raises(ConfigError) as beside:
            laid_out(own_case(TOY), world, tp=2, sequence=True)
        return [str(caught.value), str(beside.value)]

    first, second = on_ranks(odd, 2, tmp_path)[0]
    assert first == "data.seq_len=7: layout.sequence_parallel cuts it into layout.tp=2 equal parts; nearest: 8"
    assert second.endswith("nearest: layout.sequence_parallel=false") and "layers.0" in second


def test_transformers_plans_are_completed() -> None:
    """By the embedding and the head; what a size leaves out is dropped."""
    llama = spec_of("llama").tp_plan
    assert llama["model.embed_tokens"] == "embedding_rowwise" and llama["lm_head"] == "colwise_gather_output"
    assert not any("gate_proj" in name for name in spec_of("qwen3_moe").tp_plan)
    assert tp_plan(Toy_with_config()) == {}


class Toy_with_config(Toy):
    """A module that nobody has a plan for."""

    base_model_prefix = ""

    @property
    def config(self) -> Any:
        return type("Config", (), {"model_type": "unknown"})()
