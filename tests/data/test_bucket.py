from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distllm.config.errors import DataError
from distllm.data import bucket
from distllm.data.bucket import Buckets, cut_steps
from distllm.data.examples import ExampleSamples
from tests.data.examples import Given, config_of, samples_of, store_of, texts

BUDGET = 160


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExampleSamples]:
    """Translation samples under a budget of tokens, for a number of ranks; two sources, three blocks an epoch."""
    monkeypatch.setattr(bucket, "BLOCK", 60)
    stores = tuple(
        store_of(tmp_path, f"s{k}", text=texts(100, seed=k, first=10 + 200 * k), target=texts(100, seed=9 + k, longest=12))
        for k in range(2)
    )

    def make(ranks: int = 1, seed: int = 1, **train: Any) -> ExampleSamples:
        sources = [{"weight": 1.0}, {"weight": 1.0}]
        config = config_of("seq2seq", sources=sources, seed=seed, train={"batch_tokens": BUDGET, **train})
        return samples_of(Given(stores), config, ranks=ranks)

    return make


def steps_of(samples: ExampleSamples, *, until: int) -> list[range]:
    out, at = [], 0
    while at < until:
        out.append(samples.step(at).samples)
        at = out[-1].stop
    return out


def test_a_step_holds_at_most_the_budget_and_wastes_little(made: Callable[..., ExampleSamples]) -> None:
    samples = made()
    full = real = 0
    for step in steps_of(samples, until=samples.train_size):
        (batch,) = samples.train_batches([list(step)])
        tokens = batch.inputs["input_ids"].numel() + batch.inputs["decoder_input_ids"].numel()
        assert tokens <= BUDGET and len(step) > 0
        full, real = full + tokens, real + samples.tokens(step)
    assert real / full > 0.6, "sorted texts of about equal length need little padding"


def test_an_epoch_has_every_position_once(made: Callable[..., ExampleSamples]) -> None:
    samples = made()
    assert samples._buckets is not None
    for epoch in range(2):
        places = np.arange(samples.train_size) + epoch * samples.train_size
        assert sorted(samples._buckets.positions(places).tolist()) == places.tolist()


def test_steps_are_the_same_on_any_number_of_ranks_and_from_any_start(made: Callable[..., ExampleSamples]) -> None:
    one = made()
    every = steps_of(one, until=3 * one.train_size)
    for ranks, accumulation in ((2, 1), (4, 3)):
        other = made(ranks, accumulation=accumulation)
        for step in reversed(every):  # a later block first: nothing is kept from the way there
            plan = other.step(step.start)
            assert plan.samples == step and plan.accumulation == accumulation
            rows = plan.micro_batch * accumulation * ranks
            assert 0 <= rows - len(step) < accumulation * ranks
            (a,), (b,) = (s.train_batches([list(step)]) for s in (one, other))
            assert (a.inputs["input_ids"] == b.inputs["input_ids"]).all()


def test_seeds_and_blocks_shuffle_the_steps(made: Callable[..., ExampleSamples]) -> None:
    samples, other = made(), made(seed=2)
    longest = [samples.tokens(step) / len(step) for step in steps_of(samples, until=samples.train_size)]
    assert (np.diff(longest) < 0).mean() > 0.3, "short and long steps alternate"
    one, two = ([len(step) for step in steps_of(s, until=s.train_size)] for s in (samples, other))
    assert one != two
    made_of = Buckets(lambda at: 8 + at[:, None] % 30, epoch=50, budget=90, seed=1, shuffle=True)
    orders = [(made_of.positions(np.arange(50) + 50 * e) - 50 * e).tolist() for e in range(2)]
    again = Buckets(lambda at: 8 + at[:, None] % 30, epoch=50, budget=90, seed=2, shuffle=True).positions(np.arange(50))
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != again.tolist()


def test_from_the_middle_of_a_step_comes_its_rest(made: Callable[..., ExampleSamples]) -> None:
    samples = made()
    step = next(s for s in steps_of(samples, until=samples.train_size) if len(s) > 2)
    assert samples.step(step.start + 1).samples == range(step.start + 1, step.stop)


def test_an_example_wider_than_the_budget_is_refused(made: Callable[..., ExampleSamples]) -> None:
    want = r"train.batch_tokens=24: example \d+ of data.sources.0 takes 33 tokens, .* nearest: train.batch_tokens=33"
    with pytest.raises(DataError, match=want):
        made(batch_tokens=24)


def test_cut_steps_counts_the_widest_of_each_side() -> None:
    widths = np.array([[8, 8], [8, 8], [8, 16], [16, 8], [16, 16]])
    assert cut_steps(widths, budget=48).tolist() == [0, 2, 3, 4, 5]
    assert cut_steps(widths, budget=96).tolist() == [0, 3, 5]
    assert cut_steps(widths, budget=1000).tolist() == [0, 5]
    assert cut_steps(np.array([[5]] * 7), budget=15).tolist() == [0, 3, 6, 7]


def test_blocks_do_not_cross_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "BLOCK", 10)
    buckets = Buckets(lambda at: np.full((len(at), 1), 8), epoch=37, budget=64, seed=1, shuffle=True)
    ends = {buckets._block_of(place) for place in range(74)}
    assert sorted(ends) == [(0, 9), (9, 18), (18, 27), (27, 37), (37, 46), (46, 55), (55, 64), (64, 74)]


def test_without_shuffle_steps_go_from_short_to_long(made: Callable[..., ExampleSamples]) -> None:
    lengths = np.random.default_rng(1).integers(1, 30, size=50)
    buckets = Buckets(lambda at: lengths[at][:, None], epoch=50, budget=90, seed=1, shuffle=False)
    assert np.diff(lengths[buckets.positions(np.arange(50))]).min() >= 0
