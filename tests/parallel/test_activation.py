"""Checkpointing changes what is computed again and what is kept, and no bit of a gradient."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.comm import World
from distllm.config.check_activation import activation_problems
from distllm.config.errors import ConfigError
from distllm.config.schema import ActivationConfig, Config, TrainConfig
from distllm.parallel import activation
from distllm.parallel.activation import apply_activation_checkpointing, operators
from tests.ranks import on_ranks
from tests.toy import BLOCKS, HIDDEN, SEQ, Settings, Toy, run_toy, toy_batch

UP = 3 * HIDDEN + 1
ROWS = 4 * SEQ
MATMULS = operators(["matmul"])


class Watch(TorchDispatchMode):
    """Counts matrix products, and the bytes that operators made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.products += op in MATMULS
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def held(self) -> int:
        gc.collect()
        return sum(size for storage, size in self.made.values() if not storage.expired())


def run(config: ActivationConfig) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Toy()
    apply_activation_checkpointing(list(model.layers), config)
    ids = toy_batch(range(4)).inputs["input_ids"]
    with Watch() as there:
        logits = model(ids)
        held = there.held() - logits.untyped_storage().nbytes()
        loss = logits.square().sum()
    with Watch() as back:
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"there": there.products, "back": back.products, "held": held, "gradients": gradients}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return run(ActivationConfig())


CONFIGS = {
    "full": ActivationConfig(mode="full"),
    "every": ActivationConfig(mode="every", every=2),
    "matmul": ActivationConfig(mode="selective", keep=["matmul"]),
    "tanh": ActivationConfig(mode="selective", keep=["aten.tanh.default"]),
    "addmm": ActivationConfig(mode="selective", keep=["aten.addmm"]),
}
AGAIN = {  # products of a block that run again: up and down; down's result is needed by nobody and nothing waits for it
    "full": BLOCKS, "every": 2, "matmul": 0, "tanh": BLOCKS, "addmm": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_runs_again_is_counted_and_gradients_are_bitwise(name: str, plain: dict[str, Any]) -> None:
    found = run(CONFIGS[name])
    assert found["there"] == plain["there"] == 2 * BLOCKS + 1
    assert found["back"] == plain["back"] + AGAIN[name]
    for key, gradient in plain["gradients"].items():
        assert torch.equal(found["gradients"][key], gradient), key


def test_what_is_kept_is_what_was_asked_for(plain: dict[str, Any]) -> None:
    held = {name: run(config)["held"] for name, config in CONFIGS.items()}
    assert held["full"] < held["every"] < plain["held"]
    assert held["tanh"] - held["full"] == held["addmm"] - held["full"] == BLOCKS * ROWS * UP * 4
    assert held["matmul"] - held["full"] == BLOCKS * ROWS * (UP + HIDDEN) * 4
    assert held["matmul"] < plain["held"]


@pytest.fixture
def any_device_moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Lets tensors of the CPU be moved as a GPU's would, and notes them."""
    moved: list[torch.Tensor] = []

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor.clone())
        return moved[-1]

    monkeypatch.setattr(activation, "_on_device", lambda tensor: True)
    monkeypatch.setattr(activation, "SMALL", ROWS * HIDDEN)
    monkeypatch.setattr(activation, "to_cpu", to_cpu)
    yield moved


@pytest.mark.parametrize("mode", ["none", "full", "every"])
def test_offload_moves_large_activations_once_and_no_weights(
    mode: Any, plain: dict[str, Any], any_device_moves: list[torch.Tensor]
) -> None:
    found = run(ActivationConfig(mode=mode, offload=True))
    for key, gradient in plain["gradients"].items():
        assert torch.equal(found["gradients"][key], gradient), key
    sizes = sorted(t.numel() for t in any_device_moves)
    # The running mean, which the norm saves; the norm's result; that of tanh.
    inputs, rest = [ROWS * HIDDEN], [ROWS * HIDDEN] * 2 + [ROWS * UP]
    wanted = {"none": BLOCKS * rest, "full": BLOCKS * inputs, "every": 2 * inputs + rest}[mode]
    assert sizes == sorted(wanted)


def test_under_fsdp_gathered_weights_stay_too(any_device_moves: list[torch.Tensor], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(activation, "SMALL", 0)

    def moved(world: World, shard: int) -> list[tuple[int, ...]]:
        settings = Settings(shard=shard, activation=ActivationConfig(offload=True))
        run_toy(world, settings, steps=1, size=4 * shard)
        return [tuple(t.shape) for t in any_device_moves]

    wanted = on_ranks(lambda world: moved(world, 1), 1, tmp_path)[0]
    assert len(wanted) > 3 * BLOCKS and on_ranks(lambda world: moved(world, 2), 2, tmp_path) == [wanted] * 2


@pytest.mark.gpu
def test_on_a_gpu_offload_frees_memory_and_keeps_every_bit() -> None:
    def measure(offload: bool) -> tuple[int, list[torch.Tensor]]:
        torch.manual_seed(0)
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)) for _ in range(4)).cuda()
        apply_activation_checkpointing(list(blocks), ActivationConfig(offload=offload))
        x = torch.randn(4096, 512, device="cuda")
        before = torch.cuda.memory_allocated()
        for block in blocks:
            x = block(x)
        held = torch.cuda.memory_allocated() - before
        x.square().sum().backward()
        return held, [p.grad.cpu() for p in blocks.parameters()]

    (kept, wanted), (left, found) = measure(False), measure(True)
    assert left < kept / 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_one_copy_serves_all_who_save_the_same_tensor(any_device_moves: list[torch.Tensor]) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(40, 40) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            return sum(part(x) for part in self.parts) + part_that_changes(x)

    def part_that_changes(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        kept = y.square()
        y = y.detach().mul_(2).requires_grad_()  # the same memory with other values
        return kept + y.square()

    def gradient(offload: bool) -> torch.Tensor:
        torch.manual_seed(0)
        block = Three()
        apply_activation_checkpointing([block], ActivationConfig(offload=offload))
        x = torch.randn(30, 40, requires_grad=True)
        block(x)[:, 1].sum().backward()
        assert x.grad is not None
        return x.grad

    with pytest.raises(RuntimeError, match="inplace"):  # torch notices in the plain run: y was saved and then changed
        gradient(False)
    gradient(True)
    # x once for three layers; y before and after it changed; the weights, which are larger, stay
    assert [t.numel() for t in any_device_moves] == [30 * 40] * 3


def test_operators_are_found_by_name_and_others_are_refused() -> None:
    assert torch.ops.aten.mm.default in MATMULS and torch.ops.aten._grouped_mm.default in MATMULS
    assert operators(["aten.mm.default"]) == {torch.ops.aten.mm.default}
    assert torch.ops._c10d_functional.all_to_all_single.default in operators(["collectives"])
    for wrong in ("matmuls", "aten.no_such_operator", "aten.mm.no_such_overload", "aten"):
        with pytest.raises(ConfigError, match=rf"activation\.keep={wrong}: is no operator of torch; nearest: matmul, att"):
            operators(["matmul", wrong])


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"mode": "full", "keep": ["matmul"]}, "activation.keep=[matmul]: is for mode selective, not full; nearest: "),
        ({"mode": "selective", "keep": []}, "activation.keep=[]: selective needs at least one operator to keep; nearest: "),
        ({"mode": "selective", "offload": True}, "activation.offload=true: what mode selective keeps stays on the device; "),
    ],
)  # fmt: skip
def test_what_cannot_be_together_is_told(config: dict[str, Any], line: str) -> None:
    (problem,) = activation_problems(Config(activation=ActivationConfig(**config)))
    assert problem.startswith(line)


def test_offload_is_for_gpus_and_eager_blocks() -> None:
    config = Config(activation=ActivationConfig(offload=True), device="cpu", train=TrainConfig(compile=True))
    assert [p.rpartition("nearest: ")[2] for p in activation_problems(config)] == ["false", "train.compile=false"]
    assert not list(activation_problems(Config(activation=ActivationConfig(offload=True))))
