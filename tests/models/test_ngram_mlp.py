"""The example of an own module: causal, with the context it says, and it learns."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distllm.config.schema import Config, DataConfig, ModelConfig
from distllm.models.build import meta_model, resolve_spec
from distllm.models.spec import ModelSpec
from tests.models.families import filled, random_ids


def ngram(**arguments: int) -> ModelSpec:
    model = ModelConfig(spec="distllm.models.ngram_mlp:spec", spec_args=dict(arguments))
    return resolve_spec(Config(model=model, data=DataConfig(seq_len=16)), vocab_size=300)


def test_the_spec_names_its_parts() -> None:
    spec = ngram(layers=3)
    assert len(meta_model(spec).get_submodule("blocks")) == 3 and spec.vocab_size == 300


def test_a_prediction_depends_on_the_last_tokens_only() -> None:
    model, ids = filled(ngram(context=4)), random_ids(1, 16)
    changed = ids.clone()
    changed[:, 8] = 1
    with torch.no_grad():
        same = (model(ids) == model(changed)).all(dim=-1)[0]
    assert same.tolist() == [not 8 <= i < 12 for i in range(16)]


def test_flops() -> None:
    spec = ngram()
    with FlopCounterMode(display=False) as counter:
        filled(spec)(random_ids(2, 16)).sum().backward()
    assert spec.flops_per_token is not None and spec.flops_per_token(16) * 32 == counter.get_total_flops()


def test_it_learns() -> None:
    model, ids = filled(ngram(context=2)), random_ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.1 * losses[0]
