"""distllm beside other loops: equal work, turns, ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distllm.bench.against import Turns, plain_data_parallel, problem, summary
from distllm.bench.case import Cases
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
    words = f"--grid ranks={ranks} --against bare,hf-trainer,accelerate --rounds 2 --steps 2 --warmup 1 --data synthetic"
    argv = ["bench", str(tmp_path / "tiny.yaml"), *words.split(), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert run(argv) == 0
    (found,) = json.loads((tmp_path / "out" / "bench.json").read_text())["against"]
    assert found["ranks"] == ranks and found["status"] == "measured", found
    assert set(found["sides"]) == {"distllm", "bare", "hf-trainer", "accelerate"}
    for side, figures in found["sides"].items():
        assert len(figures["cpu_s"]) == 2 and all(seconds > 0 for seconds in figures["cpu_s"])
        assert (figures["ratio"] is None) == (side == "distllm")
    printed = capsys.readouterr().out
    assert "distllm takes " in printed and "train_runtime" not in printed


def test_the_bare_loop_trains_what_distllm_trains(tmp_path: Path) -> None:
    """A ratio of CPU times means something only where both compute the same: the weights after two steps agree."""
    config = plain_data_parallel(
        tiny_config(tmp_path, "schedule.name=constant", "schedule.warmup=0", "optim.lr=0.001", prepared=False), 2
    )
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
    one = Turns({"distllm": (1.0, 2.0, 3.0), "bare": (1.0, 1.0, 4.0)}, {"distllm": (1.0,) * 3, "bare": (2.0,) * 3}, 10)
    found = summary([one, one])
    assert found["distllm"]["cpu_s_per_token"] == pytest.approx(0.4) and found["distllm"]["ratio"] is None
    assert found["bare"]["cpu_s_per_token"] == pytest.approx(0.2) and found["bare"]["wall_s_per_token"] == pytest.approx(0.2)
    assert found["bare"]["ratio"] == {"median": 1.0, "low": 0.75, "high": 2.0}


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
