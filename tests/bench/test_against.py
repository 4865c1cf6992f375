"""distllm beside other loops: equal work, turns, ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distllm.bench.against import Turn, orders, plain_data_parallel, problem, summary, take_turn
from distllm.bench.case import Cases
from distllm.bench.measure import resident
from distllm.bench.sides import Setting, bare
from distllm.cli import run
from distllm.comm import World
from distllm.config.check import resolve_layout
from distllm.data.loader import step_batches
from distllm.parallel.mesh import AXES, build_mesh
from distllm.train.build_native import build_engine
from distllm.train.tasks import make_task
from tests.ranks import on_ranks
from tests.runs import tiny_config


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_sides_take_turns(ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config(tmp_path)
    sides = "bare,bare+host,hf-trainer,accelerate"
    words = f"--grid ranks={ranks} --against {sides} --rounds 2 --steps 2 --warmup 1 --data synthetic"
    argv = ["bench", str(tmp_path / "tiny.yaml"), *words.split(), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert run(argv) == 0
    (found,) = json.loads((tmp_path / "out" / "bench.json").read_text())["against"]
    assert found["ranks"] == ranks and found["status"] == "measured", found
    assert set(found["sides"]) == {"distllm", *sides.split(",")}
    for side, figures in found["sides"].items():
        assert len(figures["cpu_s"]) == 2 and all(seconds > 0 for seconds in figures["cpu_s"])
        assert (figures["ratio"] is None) == (side == "distllm")
    printed = capsys.readouterr().out
    assert "distllm takes " in printed and "train_runtime" not in printed


def test_the_bare_loop_trains_what_distllm_trains(tmp_path: Path) -> None:
    """A ratio of CPU times means something only where both compute the same: the weights after two steps agree.

    Adam divides by the gradient's size: with its usual epsilon a gradient of 1e-9 that is rounded otherwise moves its
    weight by another 1e-5.
    """
    words = ["schedule.name=constant", "schedule.warmup=0", "optim.lr=0.001", "optim.eps=1e-5"]
    config = plain_data_parallel(tiny_config(tmp_path, *words, prepared=False), 2)
    case = Cases(tmp_path, synthetic=True).case(config)

    def both(world: World) -> float:
        from distllm.bench import against, sides

        resolved = resolve_layout(config, world.size)
        mesh = build_mesh(world, sizes={axis: getattr(resolved, axis) for axis in AXES})
        samples = case.samples(resolved)
        batches = step_batches(samples, start=0, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, prefetch=1, pin=False)
        data = next(batches)
        batches.close()
        engine = build_engine(config, world, mesh=mesh, spec=case.spec, task=make_task(config))
        model = against._same_model(case, world)
        sides.cosine = lambda peak, step: peak  # type: ignore[assignment]
        step = bare(Setting(config, world, model, data.microbatches, tmp_path))
        for _ in range(2):
            engine.train_step(data.microbatches, samples=data.samples)
            step()
        ours = dict(engine.parallel.model.named_parameters())
        return max(float((p - ours[name]).detach().abs().max()) for name, p in model.named_parameters())

    assert max(on_ranks(both, 2, tmp_path / "ranks")) < 2e-6


def test_ratios_are_of_rounds() -> None:
    def rounds(*seconds: float, wall: float) -> list[list[Turn]]:
        return [[Turn(each, wall, 10)] * 2 for each in seconds]

    found = summary({"distllm": rounds(1.0, 2.0, 3.0, wall=1.0), "bare": rounds(1.0, 1.0, 4.0, wall=2.0)})
    assert found["distllm"]["cpu_s_per_token"] == pytest.approx(0.4) and found["distllm"]["ratio"] is None
    assert found["bare"]["cpu_s_per_token"] == pytest.approx(0.2) and found["bare"]["wall_s_per_token"] == pytest.approx(0.2)
    assert found["bare"]["ratio"] == {"median": 1.0, "low": 0.75, "high": 2.0}


def test_each_side_begins_in_turn() -> None:
    assert [list(order) for order in orders(["a", "b", "c"], 4)] == [list("abc"), list("acb"), list("cab"), list("cba")]


def test_only_distllm_and_who_asks_for_it_has_its_allocator(tmp_path: Path) -> None:
    """Read off the allocator itself: freed memory goes back to the system, unless it was told to keep it."""
    config = plain_data_parallel(tiny_config(tmp_path, prepared=False), 1)
    case = Cases(tmp_path, synthetic=True).case(config)

    def keeps(side: str) -> bool:
        def given(world: World) -> bool:
            take_turn(case, world, side=side, steps=1)
            before = resident()
            large = torch.ones(64 << 20, dtype=torch.uint8)
            held = resident()
            del large
            assert held - before > 32 << 20
            return held - resident() < 16 << 20

        (answer,) = on_ranks(given, 1, tmp_path / side)
        return answer

    assert [keeps(side) for side in ("distllm", "bare", "bare+host")] == [True, False, True]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("optim.name=sgd", "is for optim.name=adamw"),
        ("precision.compute=fp16", "is for precision.compute fp32 or bf16, not fp16"),
        ("train.ema=0.9", "is for plain training"), ("activation.mode=full", "is for plain training"),
        ("task.kind=masked_lm", "is for task.kind=causal_lm"),
    ],
)  # fmt: skip
def test_what_others_cannot_train_is_refused(override: str, why: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, override, prepared=False)
    told = problem(config)
    assert told is not None and told.startswith(why)
    assert problem(tiny_config(tmp_path, prepared=False)) is None and torch.is_grad_enabled()
