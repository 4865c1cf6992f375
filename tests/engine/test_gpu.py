"""What only a GPU can show: `make test-gpu`."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distllm.comm import World
from distllm.config.errors import EXIT_STOPPED
from distllm.config.schema import OptimConfig, PrecisionConfig
from distllm.train.build import build
from distllm.train.loop import train
from tests.engine.test_skip import spoil
from tests.runs import losses, metrics, state, tiny_config
from tests.toy import Settings, run_toy, step_of, toy_engine
from tests.train.test_loop import stop_at

pytestmark = pytest.mark.gpu
CPU = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def gpu() -> World:
    return World(0, 1, 0, 1, torch.device("cuda", 0))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop", "lion"])
def test_a_gpu_gives_the_losses_of_the_cpu(name: Any, gpu: World) -> None:
    settings = Settings(optim=OptimConfig(name=name, lr=1e-3))
    found, wanted = run_toy(gpu, settings, steps=4), run_toy(CPU, settings, steps=4)
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["norms"], wanted["norms"], rtol=1e-5)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_low_precision_stays_near_fp32(compute: Any, gpu: World) -> None:
    reference = run_toy(CPU, Settings())
    result = run_toy(gpu, Settings(precision=PrecisionConfig(compute=compute, initial_loss_scale=256.0)))
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=0, atol=5e-2)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_a_skipped_step_leaves_no_trace_though_the_host_reads_it_later(name: Any, gpu: World) -> None:
    def run(firsts: list[int]) -> tuple[list[Any], dict[str, Any], int]:
        engine = toy_engine(gpu, Settings(optim=OptimConfig(name=name, lr=1e-2)))
        engine._objective = spoil("gradient")
        told = []
        for first in firsts:
            batches = step_of(first, size=8, accumulation=1, dp_rank=0, dp_size=1)
            told += [s.samples.start for s in engine.train_step(batches, samples=range(first, first + 8)).skipped]
        told += [s.samples.start for s in engine.settle()]
        return told, {n: t.numpy().copy() for n, t in engine.full_tensors()}, engine.updates

    told, weights, updates = run([8, 0, 16])
    _, wanted, _ = run([8, 16])
    assert told == [0] and updates == 2
    for key, value in wanted.items():
        np.testing.assert_array_equal(weights[key], value, err_msg=key)


def test_steps_that_do_not_log_do_not_wait_for_the_device(gpu: World) -> None:
    engine = toy_engine(gpu, Settings())
    batches = [batch.to(gpu.device) for batch in step_of(8, size=8, accumulation=2, dp_rank=0, dp_size=1)]
    for _ in range(3):
        engine.train_step(batches, samples=range(8, 16))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(batches, samples=range(8, 16))  # raises where the host waits for the device
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.settle()
    assert engine.updates == 4


@pytest.mark.parametrize("extra", [(), ("precision.compute=bf16", "train.compile=true"), ("activation.mode=full",)])
def test_a_run_on_a_gpu_resumes_bitwise(extra: tuple[str, ...], gpu: World, tmp_path: Path) -> None:
    settings = ("train.deterministic=true", *extra)
    assert train(build(tiny_config(tmp_path / "whole", *settings), gpu)) == 0
    assert stop_at(5)(tiny_config(tmp_path / "broken", *settings))(gpu) == EXIT_STOPPED
    assert train(build(tiny_config(tmp_path / "broken", *settings), gpu)) == 0
    whole, broken = tmp_path / "whole" / "runs" / "tiny", tmp_path / "broken" / "runs" / "tiny"
    assert metrics(whole)[0]["peak_memory_bytes"] > 0
    assert losses(broken) == losses(whole) and len(losses(whole)) == 12
    for name, value in state(whole).items():
        np.testing.assert_array_equal(state(broken)[name], value, err_msg=name)


def train_by_command(folder: Path, *overrides: str) -> dict[int, float]:
    """The losses of a run in a process of its own, because DeepSpeed changes torch."""
    tiny_config(folder)  # writes the file and the text
    command = [sys.executable, "-m", "distllm", "train", str(folder / "tiny.yaml"), "device=cuda", "train.steps=6", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return losses(folder / "runs" / "tiny")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_fp16_on_a_gpu_is_near_the_native_engines_fp32(stage: int, tmp_path: Path) -> None:
    fp16 = ("precision.compute=fp16", "precision.initial_loss_scale=1024")
    found = train_by_command(tmp_path / "zero", "engine.name=deepspeed", f"engine.zero_stage={stage}", *fp16)
    wanted = train_by_command(tmp_path / "native")
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=0, atol=5e-2)
