"""The loss of logits that are cut along the vocabulary is torch's cross entropy of whole ones, gradient included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distllm.comm import World
from distllm.data.batch import IGNORE, Batch
from distllm.parallel.tensor_params import piece_range
from distllm.train.objectives import causal_lm, masked_lm
from tests.parallel.tensor_wire import Wire
from tests.ranks import on_ranks

BATCH, LENGTH = 3, 5


def numbers(vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with large and equal ones among them, and labels, some without target."""
    draw = torch.Generator().manual_seed(1)
    logits = 20 * torch.randn(BATCH, LENGTH, vocabulary, generator=draw, dtype=torch.float64)
    logits[0, 0] = 3.0
    logits[0, 1, -1] = logits[0, 1, 0] = 200.0
    labels = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=draw)
    labels[1, :3] = IGNORE
    return logits.to(dtype), labels


def cut(whole: torch.Tensor, world: World) -> tuple[torch.Tensor, DTensor]:
    """This rank's columns, a leaf, and the DTensor of all."""
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("tp",))
    first, last = piece_range(whole.shape[-1], pieces=world.size, index=world.rank)
    part = whole[..., first:last].clone().requires_grad_()
    logits = DTensor.from_local(part, mesh, [Shard(2)], run_check=False, shape=whole.shape, stride=whole.stride())
    return part, logits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("vocabulary", "size"), [(12, 2), (13, 4), (5, 4)])
def test_equals_cross_entropy(vocabulary: int, size: int, smoothing: float, tmp_path: Path) -> None:
    """Also of columns that the ranks do not share evenly: 13 over 4 are 4, 4, 4, 1, and 5 over 4 are 2, 2, 1, 0."""
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
        whole, labels = numbers(vocabulary, dtype)
        whole = whole.requires_grad_()
        wide = whole if dtype == torch.float64 else whole.float()
        wanted = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing)
        wanted.backward()
        assert whole.grad is not None
        right, plain = int((whole.argmax(-1) == labels).sum()), whole.detach()

        def rank(world: World, whole: torch.Tensor = plain, labels: torch.Tensor = labels) -> list:
            found = []
            for objective in (causal_lm, masked_lm):
                part, logits = cut(whole, world)
                batch = Batch({}, {"labels": labels}, ())
                terms = objective(logits, batch, label_smoothing=smoothing)
                terms.sum.backward()
                assert part.grad is not None and part.grad.dtype == part.dtype
                with torch.no_grad():
                    correct = objective(logits, batch).parts["correct"]
                found.append((float(terms.sum.detach()), int(terms.count), part.grad.double().numpy(), int(correct)))
            return found

        answers = on_ranks(rank, size, tmp_path)
        for kind in range(2):
            gradient = np.concatenate([answer[kind][2] for answer in answers], -1)
            error = np.abs(gradient - whole.grad.double().numpy()).max() / float(whole.grad.abs().max())
            assert error <= bound
            for answer in answers:
                assert answer[kind][0] == pytest.approx(float(wanted.detach()), rel=min(bound, 2e-6))
                assert answer[kind][1] == int((labels != IGNORE).sum())
                assert answer[kind][3] == right


def test_sends_numbers_of_places_and_never_logits(tmp_path: Path) -> None:
    def rank(world: World) -> list[tuple[str, int]]:
        whole, labels = numbers(64, torch.float32)
        _, logits = cut(whole, world)
        with Wire() as wire:
            causal_lm(logits, Batch({}, {"labels": labels}, ())).sum.backward()
        return wire.calls

    places = BATCH * LENGTH
    assert on_ranks(rank, 2, tmp_path) == [[("all_reduce", places), ("all_reduce", 3 * places)]] * 2
