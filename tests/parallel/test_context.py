"""Whole models over context-parallel ranks: the loss and every gradient of one process, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # compiling imports it: once here, not in every forked rank (2 s)
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.config.schema import ActivationConfig
from distllm.data.batch import IGNORE, Batch
from distllm.data.collate import collate
from distllm.models.attention import Attention
from distllm.models.build import initial_tensors
from distllm.models.spec import ModelSpec
from distllm.parallel.activation import apply_activation_checkpointing
from distllm.parallel.context import apply_cp, plain_attention, transformers_attention
from distllm.parallel.data import apply_fsdp
from distllm.parallel.mesh import AXES, Mesh, build_mesh
from distllm.parallel.parallelize import fill, find_blocks
from distllm.parallel.sequence import Method, cut_batch
from tests.models.families import VOCABULARY, filled, spec_of
from tests.parallel.wire import Wire
from tests.ranks import on_ranks

METHODS: tuple[Method, ...] = ("ring", "all_gather", "ulysses")
SEQ = 16
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "mistral": {"sliding_window": 6},
}


def spec_for(family: str) -> ModelSpec:
    return spec_of(family, **NO_DROPOUT.get(family, {}))


def made(spec: ModelSpec) -> Any:
    model: Any = filled(spec)
    model.config._experts_implementation = "eager"  # fused products of experts know no fp64
    return model


def rows(seed: int, *, documents: bool) -> Batch:
    """Two samples with some labels masked, of documents kept apart or not."""
    random = np.random.default_rng(seed)
    tokens, begins = random.integers(5, VOCABULARY, (2, SEQ + 1)), random.random((2, SEQ + 1)) < 0.3
    batch = collate(tokens, sample_ids=[2 * seed, 2 * seed + 1], begins=begins if documents else None)
    batch.targets["labels"][0, :5] = IGNORE
    return batch


@dataclass(frozen=True)
class Pass:
    """The summed loss of a forward and backward pass and the gradients by parameter."""

    loss: float
    gradients: dict[str, np.ndarray]


def run(model: nn.Module, batch: Batch) -> Pass:
    model.zero_grad()
    outputs = model(**batch.inputs)
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    labels = batch.targets["labels"]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        gradients[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).double().numpy().copy()
    return Pass(float(loss.detach()), gradients)


def cp_mesh(world: World, **sizes: int) -> Mesh:
    return build_mesh(world, sizes=dict.fromkeys(AXES, 1) | (sizes or {"cp": world.size}))


def added(parts: list[Pass]) -> Pass:
    names = parts[0].gradients
    return Pass(sum(p.loss for p in parts), {name: sum(p.gradients[name] for p in parts) for name in names})  # type: ignore[misc]


def error(found: Pass, wanted: Pass) -> float:
    """The worst error of the loss or a gradient, relative to its largest number."""
    assert found.gradients.keys() == wanted.gradients.keys() and abs(wanted.loss) > 1.0
    each = [np.abs(found.gradients[n] - g).max() / np.abs(g).max() for n, g in wanted.gradients.items()]
    return float(max(abs(found.loss / wanted.loss - 1.0), *each))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "mistral", "mixtral"])
def test_a_cut_model_is_the_model(family: str, ranks: int, tmp_path: Path) -> None:
    spec = spec_for(family)
    # Documents and a window are not for one model: a dense mask of documents says nothing of windows.
    cases = [(method, documents, dtype) for method in METHODS for documents in {False, family != "mistral"}
             for dtype in (torch.float64, torch.float32)]  # fmt: skip

    def rank(world: World) -> list[Pass]:
        mesh = cp_mesh(world)
        return [
            run(
                apply_cp(made(spec).to(dtype), mesh, method=method),
                cut_batch(rows(0, documents=documents), mesh, method=method),
            )
            for method, documents, dtype in cases
        ]

    parts = on_ranks(rank, ranks, tmp_path)
    for i, (method, documents, dtype) in enumerate(cases):
        wanted = run(made(spec).to(dtype), rows(0, documents=documents))
        worst = error(added([some[i] for some in parts]), wanted)
        assert worst < (1e-12 if dtype == torch.float64 else 2e-6), (method, documents, dtype, worst)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_looks_both_ways_and_has_padding(method: Method, tmp_path: Path) -> None:
    spec = bert()
    batch = rows(1, documents=False)
    seen = torch.ones(2, SEQ - 3, dtype=torch.int64)
    seen[1, 9:] = 0
    cut = {name: tensor[:, : SEQ - 3] for name, tensor in batch.inputs.items()}  # 13 tokens, which nothing divides
    batch = Batch(cut | {"attention_mask": seen}, {"labels": batch.targets["labels"][:, : SEQ - 3]}, batch.sample_ids)
    batch.targets["labels"][1, 9:] = IGNORE

    def rank(world: World) -> Pass:
        mesh = cp_mesh(world)
        return run(apply_cp(made(spec).double(), mesh, method=method), cut_batch(batch, mesh, method=method))

    found, wanted = added(on_ranks(rank, 2, tmp_path)), run(made(spec).double(), batch)
    keys = [name for name in wanted.gradients if name.endswith("key.bias")]
    for passed in (found, wanted):
        for name in keys:  # every key moves by it, so the softmax does not: zero but for rounding
            assert np.abs(passed.gradients.pop(name)).max() < 1e-12
    assert error(found, wanted) < 1e-12


def bert(**sizes: Any) -> ModelSpec:
    from transformers import BertConfig

    from distllm.models.hf import spec_from_config

    given = {"attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32} | sizes
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **given
    )
    return spec_from_config(config, task="masked_lm")


def test_a_model_with_eager_attention_is_cut_and_given_back(tmp_path: Path) -> None:
    """Its dense masks are made additive on the way in; the short ones must come through as they are."""
    spec = spec_of("llama", attention="eager")

    def rank(world: World) -> tuple[Pass, Pass]:
        mesh = cp_mesh(world)
        model = apply_cp(made(spec).double(), mesh, method="all_gather")
        cut = run(model, cut_batch(rows(0, documents=True), mesh, method="all_gather"))
        with plain_attention(model):
            return cut, run(model, rows(0, documents=True))

    parts = on_ranks(rank, 2, tmp_path)
    # transformers' eager softmax computes in fp32 whatever it is given; ours is as exact as torch's.
    assert error(added([cut for cut, _ in parts]), run(made(spec_for("llama")).double(), rows(0, documents=True))) < 1e-12
    assert error(parts[0][1], run(made(spec).double(), rows(0, documents=True))) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_with_sharded_data_parallelism_on_meta(method: Method, tmp_path: Path) -> None:
    """cp 2 x dp_shard 2 share the weights: FSDP adds the gradients of all tokens, with blocks recomputed."""
    spec = spec_for("llama")

    def rank(world: World) -> Pass:
        mesh = cp_mesh(world, cp=2, dp_shard=2)
        with torch.device("meta"):
            model = spec.build().double()
        assert apply_cp(model, mesh, method=method) is model
        blocks = find_blocks(model, spec=spec)
        apply_activation_checkpointing(blocks, ActivationConfig(mode="full"))
        apply_fsdp(model, mesh, blocks=blocks, compute_dtype=torch.float64, reshard_after_forward=True)
        fill(model, initial_tensors(spec, seed=1), device=torch.device("cpu"))
        return run(model, cut_batch(rows(mesh.dp_rank, documents=True), mesh, method=method))

    parts = on_ranks(rank, 4, tmp_path)
    wanted = added([run(made(spec).double(), rows(sample, documents=True)) for sample in range(2)])
    for part in parts:  # every rank has the whole gradient
        assert error(Pass(sum(p.loss for p in parts), part.gradients), wanted) < 1e-12


@pytest.mark.filterwarnings("ignore")  # those of the compiler about torch itself
def test_compiled_and_recomputed_blocks_send_as_often_as_formulas_say(tmp_path: Path) -> None:
    """A recomputed block gathers again: a third pass beside forward and backward."""
    spec = spec_for("llama")

    def rank(world: World) -> tuple[Pass, dict[str, int]]:
        mesh = cp_mesh(world)
        model = apply_cp(made(spec).double(), mesh, method="ring")
        blocks = find_blocks(model, spec=spec)
        apply_activation_checkpointing(blocks, ActivationConfig(mode="full"))
        for block in blocks:
            block.compile(backend="aot_eager")
        batch = cut_batch(rows(0, documents=False), mesh, method="ring")
        run(model, batch)
        with Wire(world.size) as wire:
            return run(model, batch), dict(wire.calls)

    parts = on_ranks(rank, 2, tmp_path)
    assert error(added([part for part, _ in parts]), run(made(spec).double(), rows(0, documents=False))) < 1e-12
    assert parts[0][1] == {"send": 2 * (1 + 1 + 2), "recv": 2 * (1 + 1 + 2)}  # two blocks: forward, again, backward


def test_bf16_under_autocast_is_as_near_as_one_process(tmp_path: Path) -> None:
    spec = spec_for("qwen3")

    def low(model: nn.Module, batch: Batch) -> Pass:
        with torch.autocast("cpu", torch.bfloat16):
            return run(model, batch)

    def rank(world: World) -> list[Pass]:
        mesh = cp_mesh(world)
        return [
            low(apply_cp(made(spec), mesh, method=method), cut_batch(rows(0, documents=False), mesh, method=method))
            for method in METHODS
        ]

    parts = on_ranks(rank, 2, tmp_path)
    exact = run(made(spec).double(), rows(0, documents=False))
    alone = error(low(made(spec), rows(0, documents=False)), exact)
    assert 1e-3 < alone < 0.2
    for i, method in enumerate(METHODS):
        assert error(added([some[i] for some in parts]), exact) < 1.5 * alone, method


def test_generation_sees_whole_rows(tmp_path: Path) -> None:
    spec = spec_for("llama")
    prompt = torch.arange(10, 22).reshape(2, 6)

    def written(model: Any) -> list[list[int]]:
        return model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=True, eos_token_id=None).tolist()

    def rank(world: World) -> tuple[list[list[int]], float]:
        mesh = cp_mesh(world)
        model = apply_cp(made(spec).double(), mesh, method="ring")
        with plain_attention(model), Wire(world.size) as wire:
            text = written(model)
        assert not wire.calls
        return text, run(model, cut_batch(rows(0, documents=False), mesh, method="ring")).loss

    found = on_ranks(rank, 2, tmp_path)
    assert [text for text, _ in found] == [written(made(spec).double())] * 2
    wanted = run(made(spec).double(), rows(0, documents=False)).loss
    assert sum(loss for _, loss in found) == pytest.approx(wanted, rel=1e-12)


class Own(nn.Module):
    """A user's module: learned positions, grouped keys, our attention."""

    def __init__(self, *, attention: Callable[[], nn.Module] = Attention) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCABULARY, 24), nn.Embedding(SEQ, 24)
        self.project, self.head = nn.Linear(24, 24 + 2 * 12), nn.Linear(24, VOCABULARY)
        self.attention = attention()

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids) + self.places(position_ids)
        heads = self.project(x).unflatten(-1, (-1, 6)).transpose(1, 2)
        seen = self.attention(*heads.split([4, 2, 2], 1), attention_mask)
        return self.head(x + seen.transpose(1, 2).flatten(2))


def own() -> Own:
    torch.manual_seed(3)
    return Own().double()


@pytest.mark.parametrize("documents", [False, True])
def test_a_users_module_is_cut_by_the_attention_that_it_holds(documents: bool, tmp_path: Path) -> None:
    def rank(world: World) -> list[Pass]:
        mesh, passes = cp_mesh(world), []
        for method in METHODS:
            model = apply_cp(own(), mesh, method=method)
            with plain_attention(model):
                whole = run(model, rows(0, documents=documents))
            passes += [run(model, cut_batch(rows(0, documents=documents), mesh, method=method)), whole]
        return passes

    parts = on_ranks(rank, 2, tmp_path)
    wanted = run(own(), rows(0, documents=documents))
    for i in range(0, 6, 2):
        assert error(added([some[i] for some in parts]), wanted) < 1e-12
        assert error(parts[0][i + 1], wanted) == 0.0


def test_autocast_reaches_attention_as_it_reaches_torchs(tmp_path: Path) -> None:
    def rank(world: World) -> list[torch.dtype]:
        attention: Any = apply_cp(own(), cp_mesh(world), method="ring").attention
        heads = torch.ones(1, 2, 4, 8)
        with torch.autocast("cpu", torch.bfloat16):
            return [attention(heads, heads, heads).dtype, Attention()(heads, heads, heads).dtype]

    assert on_ranks(rank, 2, tmp_path) == [[torch.bfloat16, torch.bfloat16]] * 2


def test_one_rank_leaves_the_model_alone() -> None:
    model, mesh = own(), Mesh(dict.fromkeys(AXES, 1), None, 0, None, None, None, None)
    assert apply_cp(model, mesh, method="ring") is model and "forward" not in vars(model.attention)
    with plain_attention(model):
        run(model, rows(0, documents=False))


def refused(make: Callable[[], nn.Module], tmp_path: Path) -> str:
    def rank(world: World) -> str:
        with torch.device("meta"):
            model = make()
        with pytest.raises(ConfigError) as caught:
            apply_cp(model, cp_mesh(world), method="ring")
        assert not any(hasattr(module, "context_parallel") for module in transformers_attention(model))
        return str(caught.value)

    return on_ranks(rank, 2, tmp_path)[0]


def test_dropout_of_attention_is_refused(tmp_path: Path) -> None:
    assert refused(lambda: spec_of("gpt2").build(), tmp_path) == (
        "layout.cp=2: not together with dropout of attention probabilities, attn_pdrop=0.1; nearest: model.sizes.attn_pdrop=0.0"
    )


def test_models_that_cannot_be_cut_are_refused_by_name(tmp_path: Path) -> None:
    import transformers

    small = {"vocab_size": 300, "d_model": 32}
    t5 = transformers.T5Config(**small, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    bart = transformers.BartConfig(**small, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                                   decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)  # fmt: skip
    roberta = transformers.RobertaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                         intermediate_size=48, attention_probs_dropout_prob=0.0)  # fmt: skip
    mamba = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1)
    seq2seq = transformers.AutoModelForSeq2SeqLM.from_config
    for make, text in (
        (lambda: seq2seq(t5), "t5 "),
        (lambda: seq2seq(bart), "bart "),
        (lambda: transformers.AutoModelForMaskedLM.from_config(roberta), "roberta "),
        (lambda: transformers.AutoModelForCausalLM.from_config(mamba), "MambaForCausalLM "),
        (lambda: spec_of("falcon").build(), "falcon "),
        (lambda: spec_of("gpt_neo").build(), "gpt_neo "),
        (lambda: spec_of("gemma2").build(), "gemma2 changes attention scores"),
        (lambda: Own(attention=lambda: nn.Bilinear(1, 1, 1)), "Own has no attention to cut"),
        (Blind, "Blind.forward takes no position_ids"),
    ):
        line = refused(make, tmp_path)
        assert line.startswith(f"layout.cp=2: {text}") and line.endswith("nearest: 1"), line


class Blind(nn.Module):
    """A module that would number its tokens from 0 on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError
