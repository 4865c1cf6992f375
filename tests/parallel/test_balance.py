"""The balance loss is the formula's, whatever the split of the batch, and counts once where blocks run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.config.schema import ActivationConfig, MoeConfig
from distllm.data.batch import Batch
from distllm.parallel.activation import apply_activation_checkpointing
from distllm.parallel.balance import RouterWatch, load_figures, real_tokens, sample_weights
from distllm.parallel.expert import expert_modules
from distllm.parallel.parallelize import find_blocks
from tests.parallel.moe import gradients, loss_sum, moe_batch, moe_spec, moe_tensors, on_mesh, one_process, worst
from tests.ranks import on_ranks

MOE = MoeConfig(balance=0.7, z_loss=0.3)


def watched(family: str, *, moe: MoeConfig = MOE, activation: ActivationConfig | None = None) -> tuple[Any, RouterWatch]:
    spec = moe_spec(family)
    model = one_process(spec, moe_tensors(spec))
    watch = RouterWatch(model, experts=expert_modules(model, plan=spec.ep_plan), moe=moe)
    if activation is not None:
        apply_activation_checkpointing(find_blocks(model, spec=spec), activation)
    return model, watch


def step(model: nn.Module, watch: RouterWatch, batches: list[Batch], *, scale: float = 1.0) -> dict[str, Any]:
    """Forward and backward of each batch; gradients, and sums of what the routers did."""
    sums: dict[str, Any] = {"balance": 0.0, "z": 0.0, "load": {}}
    for batch in batches:
        with watch.forward_pass(batch, scale=scale) as routed:
            loss = loss_sum(model, batch)
        (loss * scale).backward()
        sums["balance"] += float(sum(routed.balance.values()))
        sums["z"] += float(sum(routed.z.values()))
        for name, load in routed.load.items():
            sums["load"][name] = sums["load"].get(name, 0) + load.numpy()
    return sums | {"gradients": gradients(model)}


def by_the_book(family: str, batch: Batch) -> dict[str, Any]:
    """The formulas, sample by sample and token by token, differentiated by autograd."""
    spec = moe_spec(family)
    model = one_process(spec, moe_tensors(spec))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in expert_modules(model, plan=spec.ep_plan):
        gate = model.get_submodule(module.replace("experts", "gate"))
        gate.register_forward_hook(lambda _, __, output: seen.append((output[0], output[2])))
    loss = loss_sum(model, batch)
    balance, z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    mask, weights = real_tokens(batch), sample_weights(batch)
    for logits, index in seen:
        experts, (samples, places) = logits.shape[1], mask.shape
        for b in range(samples):
            rows = [b * places + s for s in range(places) if mask[b, s]]
            share = torch.stack([torch.softmax(logits[r], -1) for r in rows]).mean(0)
            chosen = torch.zeros(experts, dtype=torch.float64)
            for r in rows:
                for expert in index[r]:
                    chosen[expert] += experts / (index.shape[1] * len(rows))
            balance = balance + weights[b] * (chosen * share).sum()
            z = z + weights[b] * torch.stack([torch.logsumexp(logits[r], -1) ** 2 for r in rows]).mean()
    (loss + MOE.balance * balance + MOE.z_loss * z).backward()
    return {"balance": float(balance.detach()), "z": float(z.detach()), "gradients": gradients(model)}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_losses_and_gradients_are_those_of_the_formula(family: str) -> None:
    found = step(*watched(family), [moe_batch(range(4))])
    wanted = by_the_book(family, moe_batch(range(4)))
    assert found["balance"] == pytest.approx(wanted["balance"], rel=1e-12)
    assert found["z"] == pytest.approx(wanted["z"], rel=1e-12)
    # transformers takes mixtral's router scores in fp32, whatever the model's format: a rounding may flip there
    assert worst(found["gradients"], wanted["gradients"]) < 1e-12
    plain = step(*watched(family, moe=MoeConfig()), [moe_batch(range(4))])
    assert worst(plain["gradients"], wanted["gradients"]) > 1e-3


@pytest.mark.parametrize("split", [[[0], [1, 2, 3]], [[0, 2], [1, 3]], [[3], [1], [0], [2]]], ids=str)
def test_no_split_into_micro_batches_changes_it(split: list[list[int]]) -> None:
    wanted = step(*watched("mixtral"), [moe_batch(range(4))])
    found = step(*watched("mixtral"), [moe_batch(ids) for ids in split])
    assert worst(found["gradients"], wanted["gradients"]) < 1e-12
    assert found["balance"] == pytest.approx(wanted["balance"], rel=1e-12)
    for name, load in wanted["load"].items():
        np.testing.assert_array_equal(found["load"][name], load)


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 2, "dp_shard": 2}], ids=str)
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_no_layout_changes_it(sizes: dict[str, int], mode: Any, tmp_path: Path) -> None:
    spec = moe_spec("mixtral")
    tensors = moe_tensors(spec)
    wanted = step(*watched("mixtral"), [moe_batch(range(4)), moe_batch(range(4, 8))])

    def rank(world: World) -> dict[str, Any]:
        kept: list[RouterWatch] = []

        def prepare(model: nn.Module) -> None:
            kept.append(RouterWatch(model, experts=expert_modules(model, plan=spec.ep_plan), moe=MOE))
            apply_activation_checkpointing(find_blocks(model, spec=spec), ActivationConfig(mode=mode))

        model, mesh = on_mesh(world, spec, tensors, sizes=sizes, prepare=prepare)
        share = 4 // mesh.dp_size
        batches = [moe_batch(range(a + mesh.dp_rank * share, a + (mesh.dp_rank + 1) * share)) for a in (0, 4)]
        return step(model, kept[0], batches)

    found = on_ranks(rank, int(np.prod(list(sizes.values()))), tmp_path)
    for part in found:
        assert worst(part["gradients"], wanted["gradients"]) < 1e-12
    assert sum(part["balance"] for part in found) == pytest.approx(wanted["balance"], rel=1e-12)
    for name, load in wanted["load"].items():
        np.testing.assert_array_equal(sum(part["load"][name] for part in found), load)


@pytest.mark.parametrize("keep", [None, ["matmul"], ["aten._softmax", "aten.sum", "aten.mul"]], ids=str)
def test_a_block_that_runs_again_counts_once(keep: list[str] | None) -> None:
    wanted = step(*watched("mixtral"), [moe_batch(range(4))])
    activation = ActivationConfig(mode="selective", keep=keep) if keep else ActivationConfig(mode="full")
    found = step(*watched("mixtral", activation=activation), [moe_batch(range(4))])
    for name, gradient in wanted["gradients"].items():
        np.testing.assert_array_equal(found["gradients"][name], gradient, err_msg=name)
    assert found["balance"] == wanted["balance"]
    for name, load in wanted["load"].items():
        np.testing.assert_array_equal(found["load"][name], load)


def test_the_loss_scale_scales_it_too() -> None:
    wanted = step(*watched("mixtral"), [moe_batch(range(4))])["gradients"]
    found = step(*watched("mixtral"), [moe_batch(range(4))], scale=64.0)["gradients"]
    assert worst({n: g / 64 for n, g in found.items()}, wanted) < 1e-6  # mixtral's scores are fp32


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2

    def forward(self, logits: torch.Tensor) -> Any:
        scores, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, scores, index


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Router(), nn.Identity()


def test_a_sequence_that_is_cut_over_ranks_gives_the_same(tmp_path: Path) -> None:
    batch = moe_batch(range(3))
    torch.manual_seed(1)
    logits = torch.randn(3, 7, 5, dtype=torch.float64)

    def run(part: slice, group: dist.ProcessGroup | None) -> tuple[np.ndarray, float]:
        layer = nn.ModuleDict({"moe": Sparse()})
        watch = RouterWatch(layer, experts={"moe.experts": layer["moe"].experts}, moe=MOE)
        own = logits[:, part].reshape(-1, 5).clone().requires_grad_()
        inputs, targets = ({k: v[:, part] for k, v in whole.items()} for whole in (batch.inputs, batch.targets))
        cut = Batch(inputs, targets, (0, 1, 2))
        with watch.forward_pass(cut, group=group) as routed:
            _, scores, _ = layer["moe"].gate(own)
        scores.square().sum().backward()
        assert own.grad is not None
        return own.grad.view(3, -1, 5).numpy().copy(), float(routed.balance["moe.gate"])

    wanted, balance = run(slice(0, 7), None)
    parts = [slice(0, 3), slice(3, 7)]
    found = on_ranks(lambda world: run(parts[world.rank], dist.group.WORLD), 2, tmp_path)
    np.testing.assert_allclose(np.concatenate([g for g, _ in found], axis=1), wanted, rtol=0, atol=1e-13)
    assert sum(b for _, b in found) == pytest.approx(balance, rel=1e-12)


def test_even_loads_have_a_loss_of_one_for_each_target() -> None:
    layer = nn.ModuleDict({"moe": Sparse()})
    watch = RouterWatch(layer, experts={"moe.experts": layer["moe"].experts}, moe=MOE)
    batch = Batch({"input_ids": torch.zeros(1, 4, dtype=torch.long)}, {"labels": torch.zeros(1, 4, dtype=torch.long)}, (0,))
    logits = torch.eye(4, dtype=torch.float64) * 3 + torch.eye(4, dtype=torch.float64).roll(1, 0)
    with watch.forward_pass(batch) as routed:
        layer["moe"].gate(logits)
    assert float(routed.balance["moe.gate"]) / 4 == pytest.approx(1.0)
    assert load_figures(routed.load) == {"moe_load_max": 1.0, "moe_idle_experts": 0.0}
    assert load_figures({"a": torch.tensor([0.0, 6.0])}) == {"moe_load_max": 2.0, "moe_idle_experts": 1.0}


def test_nothing_happens_outside_a_watched_pass_and_without_gradients() -> None:
    model, watch = watched("mixtral")
    batch = moe_batch(range(2))
    with torch.no_grad(), watch.forward_pass(batch) as routed:
        inside = model(**batch.inputs).logits
    torch.testing.assert_close(model(**batch.inputs).logits.detach(), inside, rtol=0, atol=0)
    assert len(routed.load) == 2 and watch._call is None


def test_a_layer_without_a_router_is_refused_where_a_loss_is_asked_for() -> None:
    layer = nn.ModuleDict({"moe": nn.ModuleDict({"experts": nn.Identity()})})
    RouterWatch(layer, experts={"moe.experts": layer["moe"]}, moe=MoeConfig())
    with pytest.raises(ConfigError, match=r"moe\.balance=0\.7: moe has no router that can be balanced; nearest: 0"):
        RouterWatch(layer, experts={"moe.experts": layer["moe"]}, moe=MOE)


def test_a_router_of_another_kind_is_watched_only_where_no_loss_is_asked_for() -> None:
    class Other(Router):
        def forward(self, logits: torch.Tensor) -> Any:
            return logits

    layer = nn.ModuleDict({"moe": Sparse()})
    layer["moe"].gate = Other()
    batch = moe_batch([0])
    for moe in (MoeConfig(), MOE):
        watch = RouterWatch(layer, experts={"moe.experts": layer["moe"].experts}, moe=moe)
        with watch.forward_pass(batch) as routed:
            if moe.balance:
                with pytest.raises(ConfigError, match=r"moe: moe\.gate does not give logits, scores and experts"):
                    layer["moe"].gate(torch.zeros(7, 4))
            else:
                layer["moe"].gate(torch.zeros(7, 4))
        assert not routed.load
