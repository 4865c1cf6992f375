from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from distllm.data.order import Order, divided, held_out, key_of, keys_of, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 1023, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    places = permute(np.arange(size), size=size, key=7)
    assert sorted(places.tolist()) == list(range(size))


def test_permute_differs_by_key_and_is_no_shift() -> None:
    a, b = (permute(np.arange(1000), size=1000, key=k) for k in (1, 2))
    assert (a == b).sum() < 20
    assert len(np.unique((a - np.arange(1000)) % 1000)) > 500


def test_permute_spreads_evenly() -> None:
    """The first tenth of the places comes from all over: a chi-squared test far beyond chance."""
    size = 100_000
    first = permute(np.arange(size // 10), size=size, key=3)
    counts = np.bincount(first * 50 // size, minlength=50)
    assert ((counts - 200) ** 2 / 200).sum() < 110  # 49 degrees of freedom: 1 in 10^6 exceed it


def test_permute_holds_no_more_than_was_asked_for_at_any_size() -> None:
    indices = np.arange(10**11, 10**11 + 64)
    tracemalloc.start()
    places = permute(indices, size=4 * 10**11, key=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * indices.nbytes
    assert len(set(places.tolist())) == 64 and places.max() < 4 * 10**11


def test_every_epoch_has_every_sample_once_in_another_order() -> None:
    order = Order((100,), (1.0,), seed=5, shuffle=True)
    _, samples = order.locate(np.arange(300))
    epochs = samples.reshape(3, 100)
    assert all(sorted(e.tolist()) == list(range(100)) for e in epochs)
    assert len({tuple(e.tolist()) for e in epochs}) == 3


def test_without_shuffle_the_order_is_the_text() -> None:
    _, samples = Order((10,), (1.0,), seed=5, shuffle=False).locate(np.arange(25))
    assert samples.tolist() == [*range(10), *range(10), *range(5)]


def test_seeds_differ() -> None:
    a, b = (Order((1000,), (1.0,), seed=s, shuffle=True).locate(np.arange(1000))[1] for s in (1, 2))
    assert (a == b).sum() < 20


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.2, 0.1), (3.0, 0.001, 1.0), (1 / 3, 1 / 7, 1 / 11, 5.0)])
def test_mixture_is_exact_in_every_block(weights: tuple[float, ...], shuffle: bool) -> None:
    order = Order((50,) * len(weights), weights, seed=2, shuffle=shuffle)
    source, _ = order.locate(np.arange(3 * order.block))
    shares = np.array(weights) / sum(weights)
    for blocks in (1, 2, 3):
        n = blocks * order.block
        counts = np.bincount(source[:n], minlength=len(weights))
        assert counts.sum() == n
        assert (np.abs(counts - shares * n) <= 1).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_mixture_takes_each_sources_samples_in_turn(shuffle: bool) -> None:
    order = Order((37, 11), (0.6, 0.4), seed=2, shuffle=shuffle)
    source, sample = order.locate(np.arange(2 * order.block))
    _, ordinal = order._source(np.arange(2 * order.block))
    for k, size in enumerate(order.sizes):
        assert sorted(ordinal[source == k].tolist()) == list(range(int((source == k).sum())))
        mine = sample[source == k]
        if not shuffle:
            assert mine.tolist() == [i % size for i in range(len(mine))]
        counts = np.bincount(mine, minlength=size)
        assert counts.max() - counts.min() <= 2  # whole epochs, and a part of the last


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_slice_is_the_same_sequence(shuffle: bool) -> None:
    order = Order((37, 11, 500), (0.6, 0.4, 2.0), seed=9, shuffle=shuffle)
    whole = np.stack(order.locate(np.arange(5000)))
    draw = np.random.default_rng(0)
    for _ in range(20):
        picked = draw.integers(0, 5000, size=17)
        assert np.array_equal(np.stack(order.locate(picked)), whole[:, picked])


def test_held_out_is_stable_when_the_corpus_grows() -> None:
    small, large = held_out(1000, fraction=0.1, seed=4), held_out(5000, fraction=0.1, seed=4)
    assert np.array_equal(small, large[:1000])
    assert np.array_equal(held_out(100, fraction=0.1, seed=4, first=900), small[900:])
    assert 400 < large.sum() < 600
    assert not np.array_equal(small, held_out(1000, fraction=0.1, seed=5))
    assert held_out(1000, fraction=1.0, seed=4).all() and not held_out(1000, fraction=0.0, seed=4).any()


def test_keys_depend_on_every_part_and_its_place() -> None:
    assert len({key_of(1, 2), key_of(2, 1), key_of(1), key_of(1, 2, 0), key_of(1, -2)}) == 5


def test_a_permutation_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that makes batches takes the interpreter from the training step for as long as it computes."""
    from distllm.data import order

    passes: list[int] = []
    real = order.mix
    monkeypatch.setattr(order, "mix", lambda values: passes.append(1) or real(values))
    for start in range(0, 18_000, 128):
        permute(np.arange(start, start + 128), size=18_065, key=1)
    assert len(passes) <= 1.2 * order.ROUNDS * 141


def test_many_keys_are_the_keys_one_by_one() -> None:
    parts = np.array([0, 1, 7, 2**40])
    assert keys_of(3, parts, -2, parts + 1).tolist() == [key_of(3, p, -2, p + 1) for p in parts.tolist()]
    assert keys_of(keys_of(3, parts), 5).tolist() == [key_of(key_of(3, p), 5) for p in parts.tolist()]


def test_the_epoch_is_told() -> None:
    order = Order((10, 5), (0.5, 0.5), seed=1, shuffle=True)
    source, sample, epoch = order.where(np.arange(1024))
    for k, size in enumerate(order.sizes):
        for e in range(3):
            assert sorted(sample[(source == k) & (epoch == e)].tolist()) == list(range(size))


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_neither_side_of_a_division_is_empty(fraction: float) -> None:
    sides = [divided(n, fraction=fraction, seed=s) for n in (2, 3, 5000) for s in range(3)]
    assert all(0 < side.sum() < len(side) for side in sides)
    assert divided(1, fraction=fraction, seed=1).shape == (1,)
