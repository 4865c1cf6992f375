"""Experts over ranks give what one process gives, send what the formula says, and lose no token."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.checkpoint.chunk import chunk_of
from distllm.comm import World
from distllm.config.check_expert import expert_problems, experts_in
from distllm.config.errors import ConfigError
from distllm.config.schema import MoeConfig
from distllm.engine.local import LocalParameters, local_part
from distllm.parallel.balance import RouterWatch
from distllm.parallel.data import shard_dim
from distllm.parallel.expert import apply_ep, check_experts, expert_modules, grouped_linear
from distllm.parallel.mesh import AXES, build_mesh
from distllm.parallel.parallelize import Parallel
from tests.parallel.moe import (
    EXPERTS,
    SEQ,
    gradients,
    loss_sum,
    moe_batch,
    moe_spec,
    moe_tensors,
    on_mesh,
    one_process,
    worst,
)
from tests.ranks import on_ranks

SAMPLES = 4


def reference(family: str) -> tuple[float, dict[str, np.ndarray]]:
    spec = moe_spec(family)
    model = one_process(spec, moe_tensors(spec))
    loss = loss_sum(model, moe_batch(range(SAMPLES)))
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "sizes", [{"ep": 2}, {"ep": 2, "dp_shard": 2}, {"ep": 2, "dp_replicate": 2}, {"ep": 4}], ids=str
)
def test_any_layout_gives_the_gradients_of_one_process(family: str, sizes: dict[str, int], tmp_path: Path) -> None:
    spec = moe_spec(family)
    tensors = moe_tensors(spec)
    wanted_loss, wanted = reference(family)

    def rank(world: World) -> Any:
        model, mesh = on_mesh(world, spec, tensors, sizes=sizes)
        share = SAMPLES // mesh.dp_size
        loss = loss_sum(model, moe_batch(range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)))
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        parameters = LocalParameters(model)
        parameters.refresh()
        names = sorted(model.state_dict())
        laid = Parallel(model, (model,), model, mesh, mesh.shards is not None)
        chunks = {n: chunk_of(local_part(p), like=p, write=laid.writes(n, p)) for n, p in model.named_parameters()}
        written = {name: (c.offset, c.data.numpy().copy()) for name, c in chunks.items() if c.write}
        return float(total), gradients(model), float(parameters.squared_norm()), names, written

    answers = on_ranks(rank, int(np.prod(list(sizes.values()))), tmp_path)
    for name in wanted:  # a checkpoint of all ranks' pieces is the whole, nothing twice
        pieces = [written[name] for *_, written in answers if name in written]
        together = np.zeros(tensors[name].shape)
        for offset, piece in pieces:
            together[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))] += piece
        np.testing.assert_array_equal(together, tensors[name].numpy(), err_msg=name)
    for loss, found, square, names, _ in answers:
        assert abs(loss - wanted_loss) < 1e-12 * abs(wanted_loss)
        assert worst(found, wanted) < 1e-12
        assert square == pytest.approx(sum(float((g**2).sum()) for g in wanted.values()), rel=1e-6)  # it is fp32
        assert names == sorted(one_process(spec, tensors).state_dict())


class Layer(nn.Module):
    """Two tokens' worth of a router that is told what to choose."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def lone_experts(dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, str]]:
    spec = moe_spec("mixtral")
    model = one_process(spec, moe_tensors(spec), dtype=torch.float64)
    (module, *_) = expert_modules(model, plan=spec.ep_plan).values()
    return Layer(module).to(dtype), {"experts": "ep_dispatch_experts"}


def tokens_of(rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(5, 16, generator=generator, dtype=torch.float64).to(dtype), torch.rand(5, 2, generator=generator).to(dtype)


CHOICES = {
    "all to one expert": lambda rank: torch.tensor([[3, 3]] * 5),
    "one rank gets nothing": lambda rank: torch.tensor([[0, 1]] * 5),
    "an expert without tokens": lambda rank: torch.tensor([[0, 3], [3, 1], [1, 0], [0, 1], [3, 0]]),
    "other choices on each rank": lambda rank: torch.tensor([[0, 2], [3, 1], [1, 0], [2, 1], [3, 0]]).roll(rank, 0) * (rank == 0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", list(CHOICES))
def test_outputs_and_gradients_whatever_the_choices(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def compute(layer: nn.Module, ranks: list[int]) -> dict[str, np.ndarray]:
        hidden = torch.cat([tokens_of(r, dtype)[0] for r in ranks]).requires_grad_()
        weights = torch.cat([tokens_of(r, dtype)[1] for r in ranks]).requires_grad_()
        index = torch.cat([CHOICES[case](r) for r in ranks])
        out = layer.experts(hidden, index, weights)
        (out * torch.cat([tokens_of(r + 7, dtype)[0] for r in ranks])).sum().backward()
        assert hidden.grad is not None and weights.grad is not None
        local = {n: p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for n, p in layer.named_parameters()}
        named = {"out": out.detach(), "hidden": hidden.grad, "weights": weights.grad, **local}
        return {n: t.double().numpy().copy() for n, t in named.items()}

    layer, plan = lone_experts(dtype)
    wanted = compute(layer, [0, 1])

    def rank(world: World) -> dict[str, np.ndarray]:
        layer, _ = lone_experts(dtype)
        apply_ep(layer, build_mesh(world, sizes=dict.fromkeys(AXES, 1) | {"ep": 2}), plan=plan)
        return compute(layer, [world.rank])

    parts = on_ranks(rank, 2, tmp_path)
    for name, value in wanted.items():
        together = np.concatenate([part[name] for part in parts])
        bound = 1e-14 if dtype == torch.float64 else 2e-2
        assert np.abs(together - value).max() <= bound * np.abs(value).max(), name


def test_ranks_that_cut_a_sequence_share_experts_too(tmp_path: Path) -> None:
    """ep x cp: experts are sharded over cp, and their gradients add up over the tokens of all four ranks."""

    def compute(layer: nn.Module, ranks: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        hidden, weights = (torch.cat([tokens_of(r, torch.float64)[i] for r in ranks]) for i in (0, 1))
        index = torch.tensor([[0, 2], [3, 1], [1, 0], [2, 1], [3, 0]])
        out = layer.experts(hidden, torch.cat([index.roll(r, 0) for r in ranks]), weights)
        out.square().sum().backward()
        return out.detach().numpy().copy(), gradients(layer)

    layer, plan = lone_experts()
    out, wanted = compute(layer, [0, 1, 2, 3])

    def rank(world: World) -> Any:
        mesh = build_mesh(world, sizes=dict.fromkeys(AXES, 1) | {"ep": 2, "cp": 2})
        layer, _ = lone_experts()
        apply_ep(layer, mesh, plan=plan)
        fully_shard(layer.experts, mesh=mesh.weight_mesh(experts=True), shard_placement_fn=shard_dim(shards=2))
        layer.experts.set_gradient_divide_factor(1.0)
        layer.experts.set_force_sum_reduction_for_comms(True)
        return compute(layer, [world.rank])

    parts = on_ranks(rank, 4, tmp_path)
    np.testing.assert_allclose(np.concatenate([p[0] for p in parts]), out, rtol=0, atol=1e-14 * np.abs(out).max())
    assert max(worst(found, wanted) for _, found in parts) < 1e-12


def test_bf16_through_fsdp_stays_near_one_process(tmp_path: Path) -> None:
    spec = moe_spec("mixtral")
    tensors = moe_tensors(spec, dtype=torch.float32)
    wanted_loss, _ = reference("mixtral")

    def rank(world: World) -> float:
        model, mesh = on_mesh(
            world, spec, tensors, sizes={"ep": 2}, dtype=torch.float32, compute=torch.bfloat16
        )
        loss = loss_sum(model, moe_batch(range(2 * mesh.dp_rank, 2 * mesh.dp_rank + 2)))
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        dist.all_reduce(total := loss.detach().double())
        return float(total)

    for loss in on_ranks(rank, 2, tmp_path):
        assert loss == pytest.approx(wanted_loss, rel=3e-2)


class AllToAll(TorchDispatchMode):
    """Bytes that a rank puts into each all-to-all."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops._c10d_functional.all_to_all_single.default:
            self.bytes.append(args[0].numel() * args[0].element_size())
        return op(*args, **(kwargs or {}))


def test_all_to_all_sends_what_the_formula_says(tmp_path: Path) -> None:
    spec = moe_spec("mixtral")
    tensors = moe_tensors(spec)

    def rank(world: World) -> tuple[list[int], list[int]]:
        model, mesh = on_mesh(world, spec, tensors, sizes={"ep": 2})
        with AllToAll() as there:
            loss = loss_sum(model, moe_batch(range(2 * mesh.dp_rank, 2 * mesh.dp_rank + 2)))
        with AllToAll() as back:
            loss.backward()
        return there.bytes, back.bytes

    rows, counts = 2 * SEQ * 2 * 16 * 8, EXPERTS * 8  # N x K x H x e, and 8 x E
    found = on_ranks(rank, 2, tmp_path)
    layers = spec.hf_config.num_hidden_layers
    for there, back in found:
        assert len(there) == 3 * layers and there[0::3] == [counts] * layers and there[1::3] == [rows] * layers
        assert len(back) == 2 * layers
    # What comes back is what others sent: over both ranks it is as much.
    assert sum(sum(there[2::3]) for there, _ in found) == sum(sum(back[1::2]) for _, back in found) == 2 * rows * layers


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # FSDP does, where it is moved to a device
@pytest.mark.parametrize("fake_tensors", [False, True])
def test_a_dry_run_of_many_ranks_has_the_shapes_of_even_loads(fake_tensors: bool, tmp_path: Path) -> None:
    spec = moe_spec("mixtral", experts=16)
    tensors = moe_tensors(spec)

    def rank(world: World) -> tuple[list[int], list[int]]:
        dist.init_process_group("fake", store=FakeStore(), rank=37, world_size=128)
        many, watches = World(37, 128, 0, 1, world.device), []

        def prepare(model: nn.Module) -> None:
            experts = expert_modules(model, plan=spec.ep_plan)
            watches.append(RouterWatch(model, experts=experts, moe=MoeConfig(balance=0.1)))

        sizes = {"dp_shard": 8, "ep": 8, "dp_replicate": 2}
        model, _ = on_mesh(many, spec, tensors, sizes=sizes, even=True, prepare=prepare)
        assert model.get_parameter("model.layers.0.mlp.experts.down_proj").to_local().shape == (2, 16 // 8, 24)
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake_tensors else contextlib.nullcontext()
        with mode:
            if fake_tensors:
                model.to_empty(device="cpu")
            batch = moe_batch(range(2))
            with AllToAll() as there, watches[0].forward_pass(batch) as routed:
                loss = loss_sum(model, batch)
            with AllToAll() as back:
                loss.backward()
        assert len(routed.load) == 2 and all(p.grad is not None for p in model.parameters())
        dist.destroy_process_group()
        return there.bytes, back.bytes

    rows = 2 * SEQ * 2  # 28 rows, dealt to 16 experts: the ranks with the first 12 get 4 of each rank, the others 2
    place = 37 % 8
    there, back = on_ranks(rank, 1, tmp_path)[0]
    came = 8 * (4 if 2 * place < 12 else 2)
    assert there == [rows * 16 * 8, came * 16 * 8] * 2
    assert back == [rows * 16 * 8, came * 16 * 8] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[3, 0, 5], [8, 0, 0], [0, 0, 0]], ids=str)
def test_the_kernel_and_the_loop_agree(counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(sum(counts), 16, dtype=dtype), torch.randn(3, 24, 16, dtype=dtype)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    answers = []
    for has_kernel in (True, False):
        monkeypatch.setattr("distllm.parallel.expert._has_kernel", lambda w, has=has_kernel: has)
        x, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        out = grouped_linear(x, w, counts=counts, ends=ends)
        out.backward(torch.ones_like(out))
        answers.append([out.detach(), x.grad, w.grad])
    for kernel, loop in zip(*answers, strict=True):
        torch.testing.assert_close(kernel, loop)


def test_what_cannot_be_spread_is_refused_with_the_nearest_that_can() -> None:
    assert list(expert_problems(8, ep=3)) == ["layout.ep=3: must divide the 8 experts of a layer; nearest: 2"]
    assert list(expert_problems(8, ep=16)) == ["layout.ep=16: must divide the 8 experts of a layer; nearest: 8"]
    assert list(expert_problems(8, ep=1, tp=2)) == [] == list(expert_problems(8, ep=4))
    assert "nearest: layout.tp=1" in next(expert_problems(8, ep=2, tp=2))
    assert experts_in({"num_experts": 8}) == 8 and experts_in({"hidden_size": 8}) is None
    spec = moe_spec("qwen3_moe")
    with torch.device("meta"):
        model = spec.build()
    check_experts(model, plan=spec.ep_plan, ep=2, moe=MoeConfig())
    with pytest.raises(ConfigError, match=r"layout\.ep=3: must divide the 4 experts of a layer; nearest: 2"):
        check_experts(model, plan=spec.ep_plan, ep=3, moe=MoeConfig())
    with pytest.raises(ConfigError, match=r"has no experts that can be spread; nearest: 1"):
        check_experts(model, plan={}, ep=2, moe=MoeConfig())
    with pytest.raises(ConfigError, match=r"moe\.balance=0\.1: Qwen3MoeForCausalLM has no experts to balance; nearest: 0"):
        check_experts(model, plan={}, ep=1, moe=MoeConfig(balance=0.1))


def test_experts_of_another_form_are_refused_by_name() -> None:
    from transformers import AutoConfig

    from distllm.models.hf import spec_from_config

    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=33,
    )  # fmt: skip
    spec = spec_from_config(config, attention="eager")
    with torch.device("meta"):
        model = spec.build()
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.experts is a GptOssExperts with parameters"):
        check_experts(model, plan=spec.ep_plan, ep=2, moe=MoeConfig())
