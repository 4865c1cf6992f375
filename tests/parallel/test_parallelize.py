"""Any sharding starts from the same weights, keeps every name, and sends what the formulas say."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.config.schema import ActivationConfig, LayoutConfig
from distllm.models.build import initial_tensors, meta_model, resolve_spec
from distllm.parallel.mesh import AXES, build_mesh
from distllm.parallel.parallelize import refuse_misfits
from distllm.train.build import guessed_spec
from distllm.train.build_native import build_engine
from distllm.train.tasks import make_task
from tests.ranks import on_ranks
from tests.runs import tiny_config
from tests.toy import BLOCKS, Settings, Toy, step_of, toy_engine

LAYOUTS = [(1, 1), (2, 1), (1, 2), (1, 4), (2, 2)]


@pytest.mark.parametrize(("replicate", "shard"), LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_sharding_starts_from_the_same_weights(family: str, replicate: int, shard: int, tmp_path: Path) -> None:
    sizes = '{"n_layer": 2, "n_embd": 20, "n_head": 2}' if family == "gpt2" else '{"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}'
    config = tiny_config(tmp_path, f"model.type={family}", f"model.sizes={sizes}", prepared=False)
    spec = resolve_spec(config, vocab_size=257)
    wanted = {name: tensor.numpy() for name, tensor in initial_tensors(spec, seed=config.seed)}

    def rank(world: World) -> dict[str, np.ndarray]:
        mesh = build_mesh(world, sizes=dict.fromkeys(AXES, 1) | {"dp_replicate": replicate, "dp_shard": shard})
        engine = build_engine(config, world, mesh=mesh, spec=spec, task=make_task(config))
        assert any(isinstance(p, DTensor) for p in engine.parallel.model.parameters()) == (shard > 1)
        return {name: tensor.numpy().copy() for name, tensor in engine.full_tensors()}

    found = on_ranks(rank, replicate * shard, tmp_path / "ranks")[0]
    assert found.keys() <= wanted.keys() and len(found) > 10
    for name, value in found.items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


@pytest.mark.filterwarnings("ignore")  # those of the compiler about torch itself
def test_names_survive_every_wrapping(tmp_path: Path) -> None:
    settings = Settings(shard=2, activation=ActivationConfig(mode="full"), compile=True)

    def rank(world: World) -> list[str]:
        return sorted(toy_engine(world, settings).parallel.model.state_dict())

    assert on_ranks(rank, 2, tmp_path) == [sorted(Toy().state_dict())] * 2


@pytest.mark.parametrize(
    ("model", "axes", "line"),
    [
        ("gpt2", {"cp": 8, "cp_method": "ulysses"}, "layout.cp=8: ulysses spreads heads, and 8 does not divide 12; nearest: 6, or layout.cp_method=all_gather"),
        ("falcon", {"cp": 2}, "layout.cp=2: falcon has no attention that can be replaced; nearest: 1"),
        ("gpt2", {"pp": 16}, "layout.pp=16: 16 stages need a block each, and gpt2 has 12; nearest: 12"),
        ("gpt2", {"tp": 5}, "layout.tp=5: transformer.h.0.attn has 12 attention heads, which 5 ranks cannot share evenly; nearest: layout.tp=4"),
        ("gpt2", {"ep": 2}, "layout.ep=2: GPT2LMHeadModel has no experts that can be spread; nearest: 1"),
        ("falcon", {"tp": 2}, "layout.tp=2: falcon has no tensor-parallel plan (ModelSpec.tp_plan); nearest: layout.tp=1"),
    ],
)  # fmt: skip
def test_what_only_the_model_can_say_is_told_before_the_text_is_read(
    model: str, axes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, f"model.type={model}", "model.sizes={}", "model.dropout=0", prepared=False)
    layout = LayoutConfig.model_validate(axes)
    guessed = guessed_spec(config, tp=layout.tp)
    sizes = {axis: getattr(layout, axis) for axis in ("pp", "ep", "cp", "tp")}
    with pytest.raises(ConfigError) as caught:
        refuse_misfits(meta_model(guessed), spec=guessed, sizes=sizes, axes=layout, moe=config.moe)
    assert caught.value.problems == [line]


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_the_guess_of_a_vocabulary_is_no_reason_to_refuse(tp: int, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "model.sizes.num_attention_heads=8", prepared=False)
    guessed = guessed_spec(config, tp=tp)
    sizes = {"pp": 1, "ep": 1, "cp": 1, "tp": tp}
    refuse_misfits(meta_model(guessed), spec=guessed, sizes=sizes, axes=config.layout, moe=config.moe)


class Recorder(TorchDispatchMode):
    """Counts collectives, and the elements that a rank puts in, by kind."""

    kinds: ClassVar = {"allreduce": "all_reduce", "allgather": "all_gather", "reduce_scatter": "reduce_scatter"}

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.largest = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            kind = next((kind for part, kind in self.kinds.items() if part in str(op)), str(op))
            self.calls[kind] = self.calls.get(kind, 0) + 1
            tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, torch.Tensor)]
            self.largest = max(self.largest, *(t.numel() for t in tensors))
        return op(*args, **(kwargs or {}))


def collectives(world: World, settings: Settings) -> tuple[dict[str, int], int]:
    """What the third step sends: calls by kind, and the most elements in one."""
    engine = toy_engine(world, settings)
    mesh = engine.parallel.mesh
    micro = {"accumulation": settings.accumulation, "dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
    for _ in range(2):  # the first steps also set up: DDP arranges its buckets again at the second
        engine.train_step(step_of(0, size=8, **micro), samples=range(8))
    with Recorder() as recorder:
        engine.train_step(step_of(8, size=8, **micro), samples=range(8, 16))
    return recorder.calls, recorder.largest


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fsdp_gathers_and_scatters_as_often_as_the_formula_says(accumulation: int, tmp_path: Path) -> None:
    """Blocks are gathered for forward and backward, the root once; each unit is scattered once a micro-batch."""
    found, _ = on_ranks(lambda world: collectives(world, Settings(shard=2, accumulation=accumulation)), 2, tmp_path)[0]
    assert found == {
        "all_gather": accumulation * (2 * BLOCKS + 1),
        "reduce_scatter": accumulation * (BLOCKS + 1),
        "all_reduce": 2,  # [loss sum, count], and the squared norm
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_hsdp_reduces_across_replicas_once_a_step(accumulation: int, tmp_path: Path) -> None:
    settings = Settings(replicate=2, shard=2, accumulation=accumulation)
    found, _ = on_ranks(lambda world: collectives(world, settings), 4, tmp_path)[0]
    assert found["all_reduce"] == BLOCKS + 1 + 2  # a unit each; [loss sum, count]; the squared norm
    assert found["reduce_scatter"] == accumulation * (BLOCKS + 1)


def test_keeping_what_was_gathered_saves_the_second_gather(tmp_path: Path) -> None:
    found, _ = on_ranks(lambda world: collectives(world, Settings(shard=2, reshard=False)), 2, tmp_path)[0]
    assert found["all_gather"] == BLOCKS + 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp_reduces_once_a_step_whatever_the_accumulation(accumulation: int, tmp_path: Path) -> None:
    settings = Settings(replicate=2, accumulation=accumulation)
    found, largest = on_ranks(lambda world: collectives(world, settings), 2, tmp_path)[0]
    assert found == {"all_reduce": 2}  # one bucket, and [loss sum, count]
    assert largest == sum(p.numel() for p in Toy().parameters())
