"""The moving average of the weights: what it is, on every layout; that it comes and goes without a trace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distllm.checkpoint.find import check, find, read_full, read_weights
from distllm.checkpoint.manager import CheckpointManager
from distllm.comm import World
from distllm.config.errors import CheckpointError
from distllm.config.schema import CheckpointConfig, OptimConfig
from distllm.engine.native import NativeEngine
from tests.engine.test_skip import spoil
from tests.ranks import on_ranks
from tests.toy import Settings, step_of, toy_batch, toy_engine

LOGGER = logging.getLogger("tests.engine")
DECAY = 0.8
SGD = OptimConfig(name="sgd", lr=0.5, momentum=0.9, clip=0.5)
Weights = dict[str, np.ndarray]
LAYOUTS = [(1, {}), (2, {"replicate": 2}), (2, {"shard": 2})]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings_of(layout: dict[str, Any], *, ema: float = DECAY, **more: Any) -> Settings:
    return Settings(optim=SGD, ema=ema, **layout, **more)


def steps(engine: NativeEngine, firsts: Sequence[int]) -> list[float]:
    mesh, losses = engine.parallel.mesh, []
    for first in firsts:
        batches = step_of(first, size=8, accumulation=1, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
        losses.append(float(engine.train_step(batches, samples=range(first, first + 8)).loss))
    return losses


def weights(engine: NativeEngine) -> Weights:
    return {name: tensor.numpy().copy() for name, tensor in engine.full_tensors()}


def averages(engine: NativeEngine) -> Weights:
    with engine.averaged():
        return weights(engine)


def same(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def differ(found: Weights, other: Weights) -> None:
    empty = all(value.size == 0 for value in found.values())  # whole tensors are on rank 0 alone
    assert empty or any(not np.array_equal(found[name], value) for name, value in other.items())


@pytest.mark.parametrize(("ranks", "layout"), [*LAYOUTS, (4, {"shard": 4})], ids=str)
def test_it_is_the_sum_that_its_formula_says(ranks: int, layout: dict[str, Any], tmp_path: Path) -> None:
    def rank(world: World) -> list[Any]:
        engine = toy_engine(world, settings_of(layout))
        seen = [weights(engine)]
        for step in range(4):
            steps(engine, [8 * step])
            seen.append(weights(engine))
        return [seen, averages(engine)]

    seen, found = on_ranks(rank, ranks, tmp_path)[0]
    for name, first in seen[0].items():
        wanted = first.astype(np.float64)
        for value in seen[1:]:
            wanted = DECAY * wanted + (1 - DECAY) * value[name]
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6, err_msg=name)
    differ(found, seen[0])
    differ(found, seen[-1])
    np.testing.assert_array_equal(found["scale"], [2.0])  # a buffer


@pytest.mark.parametrize(("ranks", "layout"), [*LAYOUTS, (4, {"replicate": 2, "shard": 2})], ids=str)
def test_it_comes_and_goes_without_a_trace(ranks: int, layout: dict[str, Any], tmp_path: Path) -> None:
    def rank(world: World) -> list[Any]:
        plain = toy_engine(world, settings_of(layout, ema=0.0))
        without = [*steps(plain, [0, 8, 16])]
        engine = toy_engine(world, settings_of(layout))
        losses, batch = [], toy_batch([40 + engine.parallel.mesh.dp_rank])
        with engine.averaged():  # before the first forward, at which FSDP may move its shards
            before = float(engine.eval_step(batch).sum)
        assert before == float(engine.eval_step(batch).sum)
        for first in (0, 8, 16):
            losses += steps(engine, [first])
            trained = float(engine.eval_step(batch).sum)
            with pytest.raises(KeyError), engine.averaged():
                inside = float(engine.eval_step(batch).sum)
                with engine.averaged():
                    assert float(engine.eval_step(batch).sum) == inside
                with engine.inference() as model:
                    model(batch.inputs["input_ids"])
                raise KeyError
            assert float(engine.eval_step(batch).sum) == trained
        same(weights(engine), weights(plain))
        assert inside != trained
        whole = averages(engine)
        return [losses, without, inside, whole]

    results = on_ranks(rank, ranks, tmp_path)
    for losses, without, _, _ in results:
        assert losses == without
    # What evaluation saw is what the averaged weights answer in one process.
    one = toy_engine(World(0, 1, 0, 1, torch.device("cpu")), settings_of({}))
    with torch.no_grad():
        for name, p in one.parallel.model.named_parameters():
            p.copy_(torch.from_numpy(results[0][3][name]))
    for dp_rank, (_, _, inside, _) in enumerate(results):
        assert inside == pytest.approx(float(one.eval_step(toy_batch([40 + dp_rank])).sum), rel=1e-5)


@pytest.mark.parametrize("layout", [{}, {"shard": 2}], ids=str)
def test_a_skipped_step_does_not_move_it(layout: dict[str, Any], tmp_path: Path) -> None:
    def run(firsts: list[int]) -> Callable[[World], Weights]:
        def rank(world: World) -> Weights:
            engine = toy_engine(world, settings_of(layout))
            engine._objective = spoil("loss")
            steps(engine, firsts)
            return averages(engine)

        return rank

    ranks = 2 if layout else 1
    with_poison, without = (on_ranks(run(firsts), ranks, tmp_path)[0] for firsts in ([8, 0, 16], [8, 16]))
    same(with_poison, without)


def saved(world: World, folder: Path, layout: dict[str, Any], *, ema: float = DECAY) -> NativeEngine:
    """An engine that has taken three steps and written a checkpoint."""
    engine = toy_engine(world, settings_of(layout, ema=ema))
    steps(engine, [0, 8, 16])
    kept = manager(world, folder)
    kept.save(
        3, engine.state(), facts=engine.facts(), rng={}, layout=dict(engine.parallel.mesh.sizes), config_yaml="",
        config_digest="",
    )  # fmt: skip
    kept.wait()
    return engine


def manager(world: World, folder: Path) -> CheckpointManager:
    return CheckpointManager(folder, config=CheckpointConfig(), world=world, attempt="a", logger=LOGGER)


def loaded(world: World, folder: Path, layout: dict[str, Any], *, ema: float = DECAY) -> NativeEngine:
    engine = toy_engine(world, settings_of(layout, ema=ema))
    kept = manager(world, folder.with_name("other"))
    found = kept.find(folder / "step-3")
    engine.restore(found.manifest.facts)
    kept.load(found, engine.state(), layout={}, optional=("ema.",))
    if not any(name.startswith("ema.") for name in found.manifest.tensors):
        engine.restart_average()
    return engine


@pytest.mark.parametrize(
    ("writers", "wrote", "readers", "reads"),
    [(1, {}, 1, {}), (2, {"shard": 2}, 2, {"shard": 2}), (4, {"shard": 4}, 2, {"replicate": 2}), (1, {}, 4, {"shard": 4})],
    ids=str,
)
def test_a_checkpoint_brings_it_back_to_the_bit_on_any_layout(
    writers: int, wrote: dict[str, Any], readers: int, reads: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"

    def write(world: World) -> list[Weights]:
        engine = saved(world, folder, wrote)
        at_save = averages(engine)
        steps(engine, [24, 32])
        return [at_save, averages(engine), weights(engine)]

    def read(world: World) -> list[Weights]:
        engine = loaded(world, folder, reads)
        at_load = averages(engine)
        steps(engine, [24, 32])
        return [at_load, averages(engine), weights(engine)]

    first = on_ranks(write, writers, tmp_path)[0]
    then = on_ranks(read, readers, tmp_path)[0]
    same(then[0], first[0])
    differ(then[1], then[0])
    if wrote == reads:
        same(then[1], first[1])
        same(then[2], first[2])
    found = check(folder / "step-3")
    same({name: tensor.numpy() for name, tensor in read_weights(found)}, first[0])
    differ({name: tensor.numpy() for name, tensor in read_full(found)}, first[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_may_be_turned_on_and_off_between_attempts(ranks: int, tmp_path: Path) -> None:
    layout = {"shard": ranks} if ranks > 1 else {}
    without, with_it = tmp_path / "without" / "c", tmp_path / "with" / "c"

    def rank(world: World) -> bool:
        trained = weights(saved(world, without, layout, ema=0.0))
        engine = loaded(world, without, layout)
        same(averages(engine), trained)
        steps(engine, [24])
        differ(averages(engine), trained)
        saved(world, with_it, layout)
        same(weights(loaded(world, with_it, layout, ema=0.0)), trained)
        with pytest.raises(CheckpointError, match=r"does not have ema\.embed\.weight"):
            manager(world, tmp_path / "third").load(
                find(without, logger=LOGGER), toy_engine(world, settings_of(layout)).state(), layout={}
            )
        return True

    assert all(on_ranks(rank, ranks, tmp_path))
    same(*({n: t.numpy() for n, t in read(check(without / "step-3"))} for read in (read_weights, read_full)))


def test_there_is_no_saving_and_no_training_with_the_averages() -> None:
    engine = toy_engine(World(0, 1, 0, 1, torch.device("cpu")), settings_of({}))
    with engine.averaged():
        with pytest.raises(AssertionError, match="saving inside"):
            engine.state()
        with pytest.raises(AssertionError, match="training inside"):
            steps(engine, [0])
