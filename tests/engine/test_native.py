"""The same tokens give the same losses, gradients and weights under every data-parallel layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.config.schema import ActivationConfig, OptimConfig, PrecisionConfig
from distllm.engine.base import LossTerms
from distllm.engine.local import LocalParameters
from distllm.train.objectives import causal_lm
from distllm.train.optim import make_optimizer
from tests.ranks import on_ranks
from tests.toy import Settings, Toy, run_toy, step_of, toy_batch, toy_engine, toy_tensors

ONE = World(0, 1, 0, 1, torch.device("cpu"))
SGD = OptimConfig(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.01, clip=0.5)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same(result: dict[str, Any], reference: dict[str, Any], *, weights: float) -> None:
    assert reference["losses"][0] != reference["losses"][-1]
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=2e-6, atol=0)
    assert result["weights"].keys() == reference["weights"].keys()
    for name, value in reference["weights"].items():
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(result["weights"][name], value, rtol=0, atol=weights, err_msg=name)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, Settings(optim=SGD, accumulation=4)),
        (1, Settings(optim=SGD, activation=ActivationConfig(mode="full"))),
        (1, Settings(optim=SGD, activation=ActivationConfig(mode="every", every=2))),
        (2, Settings(optim=SGD, replicate=2)),
        (2, Settings(optim=SGD, replicate=2, accumulation=2)),
        (2, Settings(optim=SGD, shard=2)),
        (2, Settings(optim=SGD, shard=2, accumulation=4)),
        (2, Settings(optim=SGD, shard=2, reshard=False, accumulation=2)),
        (2, Settings(optim=SGD, shard=2, activation=ActivationConfig(mode="full"))),
        (4, Settings(optim=SGD, replicate=4, accumulation=2)),
        (4, Settings(optim=SGD, shard=4)),
        (4, Settings(optim=SGD, replicate=2, shard=2, accumulation=2)),
    ],
    ids=str,
)
def test_any_split_of_the_same_tokens_is_the_same_run(ranks: int, settings: Settings, tmp_path: Path) -> None:
    reference = run_toy(ONE, Settings(optim=SGD))
    for result in on_ranks(lambda world: run_toy(world, settings), ranks, tmp_path):
        np.testing.assert_allclose(result["losses"], reference["losses"], rtol=0, atol=2e-6)
    result = on_ranks(lambda world: run_toy(world, settings), ranks, tmp_path)[0]
    assert_same(result, reference, weights=2e-6)


def run_counted(world: World) -> float:
    """A step whose first sample counts 2**24 targets and each other one, as a sum in fp32 would no longer see; its loss."""
    engine = toy_engine(world, Settings(optim=SGD, shard=world.size))

    def objective(outputs: Any, batch: Any) -> LossTerms:
        first = 0 in batch.sample_ids
        count = torch.tensor(2**24 if first else len(batch.sample_ids))
        return LossTerms(0.0 * causal_lm(outputs, batch).sum + (2**24 + 6 if first else 0), count)

    engine._objective = objective
    batches = step_of(0, size=8, accumulation=8 // world.size, dp_rank=world.rank, dp_size=world.size)
    return float(engine.train_step(batches, samples=range(8)).loss)


@pytest.mark.parametrize("ranks", [1, 2])
def test_targets_are_counted_beyond_what_fp32_counts(ranks: int, tmp_path: Path) -> None:
    exact = np.float32((2**24 + 6) / (2**24 + 7))
    assert exact != np.float32((2**24 + 6) / 2**24)
    assert on_ranks(run_counted, ranks, tmp_path) == [exact] * ranks


@pytest.mark.parametrize("name", ["adamw", "adam", "rmsprop", "lion"])
def test_every_optimizer_trains_alike_when_sharded(name: Any, tmp_path: Path) -> None:
    optim = OptimConfig(name=name, lr=1e-3, clip=0.5, l1=1e-4, l2=1e-3)
    reference = run_toy(ONE, Settings(optim=optim), steps=4)
    result = on_ranks(lambda world: run_toy(world, Settings(optim=optim, shard=2), steps=4), 2, tmp_path)[0]
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop", "lion"])
def test_the_first_steps_are_those_of_a_bare_optimizer(name: Any) -> None:
    """The state is made ahead, by a step at rate zero; decay that counts as a gradient must leave nothing in it."""
    optim = OptimConfig(name=name, lr=1e-2, weight_decay=0.1, clip=0.0)
    found = run_toy(ONE, Settings(optim=optim), steps=2)
    model = Toy()
    model.load_state_dict(dict(toy_tensors()), strict=False)
    optimizer = make_optimizer(optim, model=model, device=ONE.device)(LocalParameters(model))
    for step, lr in enumerate((0.5e-2, 1e-2)):  # two steps of warm-up
        (batch,) = step_of(8 * step, size=8, accumulation=1, dp_rank=0, dp_size=1)
        terms = causal_lm(model(**batch.inputs), batch)
        (terms.sum / terms.count).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    for key, value in model.named_parameters():
        np.testing.assert_allclose(found["weights"][key], value.detach().numpy(), rtol=0, atol=2e-6, err_msg=key)


def test_two_ranks_ddp_and_fsdp_agree(tmp_path: Path) -> None:
    """Bitwise before the first update; after it the clip factor's last bit depends on how a norm is added up."""
    ddp = on_ranks(lambda world: run_toy(world, Settings(replicate=2)), 2, tmp_path)[0]
    fsdp = on_ranks(lambda world: run_toy(world, Settings(shard=2)), 2, tmp_path)[0]
    assert ddp["losses"][0] == fsdp["losses"][0]
    np.testing.assert_allclose(fsdp["losses"], ddp["losses"], rtol=2e-7, atol=0)
    for name, value in ddp["weights"].items():
        np.testing.assert_allclose(fsdp["weights"][name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", [{}, {"replicate": 2}, {"shard": 2}])
def test_low_precision_stays_near_fp32(compute: Any, layout: dict[str, int], tmp_path: Path) -> None:
    reference = run_toy(ONE, Settings())
    ranks = 2 if layout else 1
    settings = Settings(precision=PrecisionConfig(compute=compute, initial_loss_scale=256.0), **layout)
    result = on_ranks(lambda world: run_toy(world, settings), ranks, tmp_path)[0]
    assert result["updates"] == 3
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=0, atol=5e-2)
    assert result["losses"] != reference["losses"]  # the products really ran in the low precision
    assert all(value.dtype == np.float32 for value in result["weights"].values())


def test_tied_weights_stay_tied_and_buffers_arrive(tmp_path: Path) -> None:
    def check(world: World) -> tuple[bool, float]:
        engine = toy_engine(world, Settings(shard=2))
        engine.train_step([toy_batch([world.rank])], samples=range(2))
        model = engine.parallel.model
        return model.get_parameter("embed.weight") is model.get_parameter("head.weight"), float(model.get_buffer("scale"))

    assert on_ranks(check, 2, tmp_path) == [(True, 2.0)] * 2


def test_an_unused_parameter_is_refused_by_ddp_and_bearable_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Toy.__init__

    def with_unused(self: Toy) -> None:
        build(self)
        self.unused = nn.Linear(2, 2, bias=False)

    monkeypatch.setattr(Toy, "__init__", with_unused)

    def rank(world: World) -> str:
        with pytest.raises(ConfigError) as caught:
            run_toy(world, Settings(replicate=2))
        return str(caught.value)

    wanted = "model: unused.weight got no gradient, and layout.dp_replicate needs one for each; nearest: layout.dp_shard"
    assert on_ranks(rank, 2, tmp_path) == [wanted] * 2
    for ranks, settings in ((1, Settings()), (2, Settings(shard=2))):
        state = on_ranks(lambda world, s=settings: list(trained_state(world, s)), ranks, tmp_path)[0]
        assert "optim.unused.weight.exp_avg" in state


def test_a_parameter_without_a_gradient_is_known_to_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Toy.__init__

    def with_unused(self: Toy) -> None:
        build(self)
        self.unused = nn.Linear(2, 2, bias=False)

    monkeypatch.setattr(Toy, "__init__", with_unused)

    def rank(world: World) -> tuple[bool, Any]:
        engine = toy_engine(world, Settings(stages=2))
        engine.train_step(step_of(0, size=8, accumulation=2, dp_rank=0, dp_size=1), samples=range(8))
        return "unused.weight" in engine.parameters.whole, engine.unused

    assert on_ranks(rank, 2, tmp_path) == [(False, ("unused.weight",)), (True, ("unused.weight",))]


def trained_state(world: World, settings: Settings) -> dict[str, Any]:
    """The checkpoint's names, which are the same before and after the first step."""
    engine = toy_engine(world, settings)
    before = set(engine.state())
    mesh = engine.parallel.mesh
    engine.train_step(step_of(0, size=8, accumulation=1, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size), samples=range(8))
    assert set(engine.state()) == before
    return engine.state()


@pytest.mark.filterwarnings("ignore")  # those of the compiler about torch itself
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_blocks_give_the_same_run(ranks: int, tmp_path: Path) -> None:
    reference = run_toy(ONE, Settings(optim=SGD))
    settings = Settings(optim=SGD, shard=ranks, compile=True)
    result = on_ranks(lambda world: run_toy(world, settings), ranks, tmp_path)[0]
    assert_same(result, reference, weights=2e-6)


def test_shards_smaller_than_the_ranks_may_be_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.toy.HIDDEN", 3)  # four ranks share norms of three numbers
    reference = run_toy(ONE, Settings(optim=SGD))
    result = on_ranks(lambda world: run_toy(world, Settings(optim=SGD, shard=4)), 4, tmp_path)[0]
    assert_same(result, reference, weights=2e-6)


def test_bf16_by_autocast_and_by_fsdp_agree_to_the_digits_of_the_format(tmp_path: Path) -> None:
    bf16 = PrecisionConfig(compute="bf16")
    ddp = on_ranks(lambda world: run_toy(world, Settings(replicate=2, precision=bf16)), 2, tmp_path)[0]
    fsdp = on_ranks(lambda world: run_toy(world, Settings(shard=2, precision=bf16)), 2, tmp_path)[0]
    np.testing.assert_allclose(fsdp["losses"], ddp["losses"], rtol=2.0**-8, atol=0)
