"""Where a model can be cut, who holds what, and which models are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from distllm.config.errors import ConfigError
from distllm.models.build import meta_model
from distllm.models.spec import ModelSpec
from distllm.parallel.cut import find_chain
from distllm.parallel.stages import apply_pp, own_blocks
from tests.models.families import FAMILIES, spec_of
from tests.toy import Toy, toy_spec

SIZE = 8


def chain_of(spec: ModelSpec):  # type: ignore[no-untyped-def]
    return find_chain(meta_model(spec), spec=spec, pp=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_is_a_chain(family: str) -> None:
    chain = chain_of(spec_of(family))
    assert len(chain.blocks) == 2 and chain.width == 32
    assert chain.front and len(chain.back) == 2


def test_positions_stand_before_the_blocks_and_tied_weights_at_both_ends() -> None:
    chain = chain_of(spec_of("gpt2"))
    assert chain.front == ("transformer.wte", "transformer.wpe")
    assert chain.back == ("transformer.ln_f", "lm_head")
    assert chain.tied == ("transformer.wte.weight",)


def test_an_encoder_is_a_chain_too() -> None:
    from transformers import BertConfig

    from distllm.models.hf import spec_from_config

    config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    chain = chain_of(spec_from_config(config, task="masked_lm"))
    assert len(chain.blocks) == 3 and chain.tied == ("bert.embeddings.word_embeddings.weight",)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_stages_hold_every_parameter_once_and_tied_ones_twice(family: str) -> None:
    spec = spec_of(family, num_hidden_layers=4)
    whole = [name for name, _ in meta_model(spec).named_parameters()]
    held: list[str] = []
    for rank in range(3):
        cut = apply_pp(meta_model(spec), rank=rank, owners=(0, 1, 2), spec=spec, seq_len=8)
        held += [name for name, _ in cut.model.named_parameters()]
        assert len(own_blocks(cut.model, spec=spec)) == len(cut.blocks[rank])
    assert sorted(held) == sorted([*whole, *cut.chain.tied])


def test_several_stages_of_a_rank_are_one_module_by_name() -> None:
    spec = spec_of("gpt2", num_hidden_layers=4)
    cut = apply_pp(meta_model(spec), rank=0, owners=(0, 1, 1, 0), spec=spec, seq_len=8, split=[1, 1, 1, 1])
    names = [name for name, _ in cut.model.named_parameters()]
    assert len(names) == len(set(names)) == len(list(cut.model.parameters()))
    assert {name.split(".")[2] for name in names if ".h." in name} == {"0", "3"}
    assert set(names) <= set(cut.model.state_dict())
    assert cut.model.get_parameter("transformer.h.3.ln_1.weight").shape == (32,)
    assert isinstance(cut.model.get_submodule("lm_head"), nn.Linear)
    assert isinstance(cut.model.get_submodule("transformer.wte"), nn.Embedding)
    cut.model.eval()
    assert not any(stage.module.training for stage in cut.stages)


class Skipping(Toy):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = first = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x + first)
        return self.head(self.norm(x))


class Twice(Toy):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in [*self.layers, self.layers[0]]:
            x = layer(x)
        return self.head(self.norm(x))


class Between(Toy):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
            self.norm(x)
        return self.head(x)


class Loose(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))


class Given(Toy):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = first = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, memory=first * 2)
        return self.head(self.norm(x))


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Skipping, "layers.1 is not given what the block before it returned"),
        (Twice, "its 3 blocks are not called one after another, each once"),
        (Between, "norm is called between blocks"),
        (Loose, "its parameter gain stands beside the blocks, not before or after them"),
        (Given, "layers.0 is also given something computed from parameters before it (argument memory)"),
    ],
)
def test_what_is_no_chain_is_refused_by_name(build: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ConfigError) as error:
        chain_of(replace(toy_spec(), build=build))
    assert str(error.value) == f"layout.pp=2: toy cannot be cut into stages: {why}; nearest: 1"


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config

    from distllm.models.hf import spec_from_config

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    spec = spec_from_config(T5Config(**sizes, decoder_start_token_id=0), task="seq2seq")
    with pytest.raises(ConfigError, match=r"^layout.pp=2: t5 cannot be cut into stages: it has 2 stacks of .*; nearest: 1$"):
        chain_of(spec)


def test_several_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"toy cannot be cut into stages: its micro-batches go to different heads; nearest: 1"):
        chain_of(replace(toy_spec(), task="multi_task"))


class Masked(Toy):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * attention_mask[:, :, None]


def test_a_mask_that_a_module_insists_on_is_given() -> None:
    assert chain_of(replace(toy_spec(), build=Masked)).blocks == ("layers.0", "layers.1", "layers.2")


def test_a_loss_over_the_routers_of_all_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.sizes.output_router_logits=true: .*; nearest: false"):
        chain_of(spec_of("mixtral", output_router_logits=True))
