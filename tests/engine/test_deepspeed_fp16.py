"""fp16 under DeepSpeed with our loss scale, on a CPU, which torch has fp16 kernels for; DeepSpeed is told that it has them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distllm.checkpoint.find import find, read_facts
from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.config.schema import Config
from distllm.train.build import build
from tests.engine.zero_runs import COMMON, go, zero
from tests.ranks import on_ranks
from tests.runs import losses, metrics, run_tiny, state, tiny_config

FP16 = "precision.compute=fp16"
OFFLOAD = ("engine.offload_optimizer=cpu",)
pytestmark = pytest.mark.deepspeed


def claim_fp16(has: bool) -> None:
    """Let DeepSpeed believe that the CPU of this rank has fp16, or has not; some have."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: has


def run_fp16(world: World, config: Config) -> int:
    claim_fp16(True)
    return run_tiny(world, config)


def go_fp16(place: Path, name: str, *how: str, steps: int) -> Path:
    config = tiny_config(place, *COMMON, FP16, f"name={name}", f"train.steps={steps}", *how)
    assert on_ranks(lambda world: run_fp16(world, config), 2, place / "ranks") == [0] * 2
    return place / "runs" / name


@pytest.fixture(scope="module")
def reference(place: Path) -> Path:
    """The run folder of one process of the native engine in fp32."""
    return go(place, "one", steps=3, ranks=1)


@pytest.mark.parametrize("how", [zero(1), zero(2, *OFFLOAD), zero(3), zero(2, "layout.tp=2"), zero(1, "layout.pp=2")])
def test_fp16_is_near_fp32(how: tuple[str, ...], place: Path, reference: Path) -> None:
    run = go_fp16(place, "near" + "".join(how)[-12:].replace("=", "-"), *how, "precision.initial_loss_scale=1024", steps=3)
    np.testing.assert_allclose(list(losses(run).values()), list(losses(reference).values()), rtol=0, atol=2e-3)
    norms = [[line["grad_norm"] for line in metrics(folder) if "loss" in line] for folder in (run, reference)]
    np.testing.assert_allclose(*norms, rtol=5e-3)
    assert metrics(run)[-2]["skipped"] == 0


@pytest.mark.parametrize("how", [zero(2, *OFFLOAD), zero(3), zero(1, "layout.pp=2")])
def test_an_overflow_skips_the_step_and_halves_the_scale_which_a_checkpoint_keeps(how: tuple[str, ...], place: Path) -> None:
    how = (*how, f"precision.initial_loss_scale={2**19}", "precision.loss_scale_window=2")
    unbroken = go_fp16(place, f"unbroken-{how[1][-1]}", *how, steps=4)
    go_fp16(place, f"broken-{how[1][-1]}", *how, steps=2)
    broken = go_fp16(place, f"broken-{how[1][-1]}", *how, steps=4)
    assert losses(broken) == losses(unbroken)
    ours, expected = state(broken), state(unbroken)
    assert all(np.array_equal(ours[name], value) for name, value in expected.items())
    facts = engine_facts(unbroken)
    assert facts == engine_facts(broken)
    skipped, scale = metrics(unbroken)[-2]["skipped"], facts["loss_scale"]["value"]
    told = (unbroken / "logs" / "rank-0.log").read_text()
    assert told.count("the gradient is not finite") == skipped > 1
    doubled = round(np.log2(scale)) - 19 + skipped
    assert doubled in (1, 2) and scale == 2.0 ** (19 - skipped + doubled)  # four finite steps, two of them in a row once or twice
    assert facts["updates"] == 4 and facts["skips_in_a_row"] == 0


def engine_facts(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = read_facts(find(run, logger=logging.getLogger("tests")))["engine"]
    return facts


def test_without_fp16_on_the_device_it_says_what_to_do(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, *COMMON, FP16, *zero(2))

    def refused(world: World) -> str:
        claim_fp16(False)
        with pytest.raises(ConfigError) as caught:
            build(config, world)
        return str(caught.value)

    (told,) = on_ranks(refused, 1, tmp_path / "ranks")
    assert "precision.compute=fp16: DeepSpeed has no fp16 on this cpu; nearest: bf16" in told
