"""Every collective and its gradient equal what one process computes from all ranks' tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distllm.comm import World
from distllm.parallel.collectives import (
    all_to_all,
    copy_all_to,
    copy_to,
    gather_from,
    reduce_from,
    reduce_scatter_to,
    scatter_to,
)
from tests.ranks import on_ranks

SHAPE = (4, 3, 8)


def tensor(rank: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def forward_and_back(function: Callable[..., torch.Tensor], *, same: bool, same_gradient: bool, **options: Any) -> Any:
    """A rank's output and input gradient; `same`: all ranks start from rank 0's tensor, or get its gradient."""

    def rank(world: World) -> tuple[np.ndarray, np.ndarray]:
        x = tensor(0 if same else world.rank).requires_grad_()
        before = x.detach().clone()
        y = function(x, dist.group.WORLD, **options)
        y.backward(tensor(10 + (0 if same_gradient else world.rank), tuple(y.shape)))
        assert torch.equal(x, before) and x.grad is not None and x.grad.is_contiguous()
        return y.detach().numpy(), x.grad.numpy()

    return rank


def check(found: list[tuple[np.ndarray, np.ndarray]], outputs: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    for (y, g), wanted, back in zip(found, outputs, gradients, strict=True):
        np.testing.assert_allclose(y, wanted.numpy(), rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(g, back.numpy(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("size", [2, 4])
def test_copy_and_reduce(size: int, tmp_path: Path) -> None:
    x, total = tensor(0), sum(tensor(r) for r in range(size))
    g, all_g = tensor(10), sum(tensor(10 + r) for r in range(size))
    check(on_ranks(forward_and_back(copy_to, same=True, same_gradient=False), size, tmp_path), [x] * size, [all_g] * size)
    check(on_ranks(forward_and_back(reduce_from, same=False, same_gradient=True), size, tmp_path), [total] * size, [g] * size)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_gather(dim: int, tmp_path: Path) -> None:
    whole = torch.cat([tensor(0), tensor(1)], dim)
    backs = [tensor(10 + r, tuple(whole.shape)) for r in range(2)]
    found = on_ranks(forward_and_back(gather_from, same=False, same_gradient=False, dim=dim), 2, tmp_path)
    check(found, [whole] * 2, list((backs[0] + backs[1]).chunk(2, dim)))
    found = on_ranks(forward_and_back(gather_from, same=False, same_gradient=True, dim=dim, partial=False), 2, tmp_path)
    check(found, [whole] * 2, list(backs[0].chunk(2, dim)))


@pytest.mark.parametrize("dim", [0, 2])
def test_scatter_and_reduce_scatter(dim: int, tmp_path: Path) -> None:
    pieces, sums = tensor(0).chunk(2, dim), (tensor(0) + tensor(1)).chunk(2, dim)
    back = torch.cat([tensor(10 + r, tuple(pieces[0].shape)) for r in range(2)], dim)
    for function, same, outputs in ((scatter_to, True, pieces), (reduce_scatter_to, False, sums)):
        found = on_ranks(forward_and_back(function, same=same, same_gradient=False, dim=dim), 2, tmp_path)
        check(found, list(outputs), [back, back])


@pytest.mark.parametrize(("split", "concat"), [(0, 1), (2, 1), (1, 2), (0, 2), (2, 0)])
def test_all_to_all(split: int, concat: int, tmp_path: Path) -> None:
    def inputs(first: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
        return [tensor(first + r, shape) for r in range(2)]

    def exchanged(tensors: list[torch.Tensor], cut: int, joined: int) -> list[torch.Tensor]:
        return [torch.cat([t.chunk(2, cut)[r] for t in tensors], joined) for r in range(2)]

    shape = (4, 6, 8)

    def rank(world: World) -> tuple[np.ndarray, np.ndarray]:
        x = tensor(world.rank, shape).requires_grad_()
        y = all_to_all(x, dist.group.WORLD, split=split, concat=concat)
        y.backward(tensor(10 + world.rank, tuple(y.shape)))
        assert x.grad is not None
        return y.detach().numpy(), x.grad.numpy()

    outputs = exchanged(inputs(0, shape), split, concat)
    check(on_ranks(rank, 2, tmp_path), outputs, exchanged(inputs(10, tuple(outputs[0].shape)), concat, split))


def test_gradients_of_several_travel_together(tmp_path: Path) -> None:
    def rank(world: World) -> list[np.ndarray]:
        x = [torch.ones(3, requires_grad=True), torch.ones(2, 2, dtype=torch.float64, requires_grad=True)]
        y = copy_all_to(tuple(x), dist.group.WORLD)
        (y[0].sum() * (world.rank + 1) + y[1].sum() * (world.rank + 5)).backward()
        return [t.grad.numpy() for t in x if t.grad is not None]

    for first, second in on_ranks(rank, 2, tmp_path):
        np.testing.assert_array_equal(first, np.full(3, 3.0))
        np.testing.assert_array_equal(second, np.full((2, 2), 11.0))


def test_a_group_of_one_costs_nothing() -> None:
    x = tensor(0)
    assert copy_to(x, None) is x and reduce_from(x, None) is x and copy_all_to((x,), None) == (x,)
    assert gather_from(x, None, dim=1) is x and scatter_to(x, None, dim=1) is x
    assert reduce_scatter_to(x, None, dim=1) is x and all_to_all(x, None, split=0, concat=1) is x
