"""Optimizers: which parameters decay, that each update is the textbook's, and L1 and L2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distllm.config.schema import OptimConfig
from distllm.engine.local import LocalParameters
from distllm.train.optim import decaying_names, make_optimizer, make_penalty
from tests.toy import Toy

CPU = torch.device("cpu")


def test_only_matrices_of_linear_maps_decay() -> None:
    names = decaying_names(Toy(), embeddings=False)
    assert names == {f"layers.{i}.{m}.weight" for i in range(3) for m in ("up", "down")}  # the head is tied to the embedding
    assert decaying_names(Toy(), embeddings=True) - names == {"embed.weight"}


def one_step(config: OptimConfig, *, p: float = 0.5, g: float = -0.2, steps: int = 1) -> float:
    """A weight p (a 1 x 1 matrix) after `steps` updates with the gradient g."""
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(p)
    local = LocalParameters(layer)
    optimizer = make_optimizer(config, model=layer, device=CPU)(local)
    penalty = make_penalty(config, model=layer)
    for _ in range(steps):
        layer.weight.grad = torch.full((1, 1), g)
        if penalty:
            penalty(local)
        optimizer.step()
    return layer.weight.item()


@pytest.mark.parametrize("implementation", ["auto", "foreach", "loop"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", 0.5 * (1 - 0.1 * 0.01) + 0.1),  # the first Adam step is lr * sign(g)
        ("adam", 0.5 + 0.1),
        ("sgd", 0.5 - 0.1 * (-0.2 + 0.01 * 0.5)),
        ("rmsprop", 0.5 + 0.1 * 0.195 / (0.195**2 * 0.01) ** 0.5),
        ("lion", 0.5 * (1 - 0.1 * 0.01) + 0.1),
    ],
)
def test_the_first_update_is_the_textbooks(name: Any, expected: float, implementation: Any) -> None:
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.01, implementation=implementation)
    assert one_step(config) == pytest.approx(expected, rel=1e-5)


def test_lion_follows_its_paper_over_several_steps() -> None:
    p, m, lr, wd, (b1, b2) = 0.5, 0.0, 0.1, 0.01, (0.9, 0.99)
    for _ in range(5):
        p = p * (1 - lr * wd) - lr * (1.0 if b1 * m + (1 - b1) * -0.2 > 0 else -1.0)
        m = b2 * m + (1 - b2) * -0.2
    config = OptimConfig(name="lion", lr=lr, weight_decay=wd, betas=(b1, b2))
    assert one_step(config, steps=5) == pytest.approx(p, rel=1e-6)


def test_l1_and_l2_add_their_gradients() -> None:
    plain = OptimConfig(name="sgd", lr=0.1, weight_decay=0.0, momentum=0.0)
    assert one_step(plain) == pytest.approx(0.5 + 0.02)
    assert one_step(plain.model_copy(update={"l1": 0.3})) == pytest.approx(0.5 - 0.1 * (-0.2 + 0.3))
    assert one_step(plain.model_copy(update={"l2": 0.3})) == pytest.approx(0.5 - 0.1 * (-0.2 + 0.3 * 0.5))
    assert make_penalty(plain, model=Toy()) is None


def test_what_does_not_decay_has_no_penalty_either() -> None:
    model = Toy()
    local = LocalParameters(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    penalty = make_penalty(OptimConfig(l1=1.0), model=model)
    assert penalty is not None
    penalty(local)
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched == decaying_names(model, embeddings=False)


def test_a_group_for_each_decay_and_scale_and_only_what_learns() -> None:
    model = Toy()
    model.layers[0].requires_grad_(False)
    scales = {name: 0.5 if name.startswith("layers.1.") else 1.0 for name, _ in model.named_parameters()}
    local = LocalParameters(model)
    optimizer = make_optimizer(OptimConfig(weight_decay=0.1), model=model, device=CPU, scales=scales)(local)
    names = {id(p): name for name, p in local.local.items()}
    groups = {(g["weight_decay"], g["lr_scale"]): {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert len(optimizer.param_groups) == 4 and len(local.local) == 13
    assert groups[0.1, 0.5] == {"layers.1.up.weight", "layers.1.down.weight"}
    assert groups[0.0, 0.5] == {"layers.1.up.bias", "layers.1.norm.weight", "layers.1.norm.bias"}
    assert groups[0.1, 1.0] == {"layers.2.up.weight", "layers.2.down.weight"}
