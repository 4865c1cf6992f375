"""Parameters in files under stage 3: against one process of the native engine, and against parameters in the CPU's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import distllm.train.build_deepspeed as builder
from distllm.cli import run as distllm
from distllm.comm import World
from distllm.config.deepspeed_json import FileBuffers, deepspeed_json
from distllm.config.schema import Config
from distllm.engine.deepspeed_start import least_locked, parts_to_reserve
from distllm.train.build import build
from distllm.verify.file_buffers import predicted_buffers
from tests.engine.files_in_python import use_python
from tests.engine.zero_runs import COMMON, assert_equal_runs, uneven_run, zero
from tests.ranks import on_ranks
from tests.runs import losses, metrics, state, tiny_config

SIZES = "model.sizes={hidden_size: 256, intermediate_size: 2048, num_hidden_layers: 2, num_attention_heads: 4}"
"""What has a megabyte on each rank lies in a file: the three parameters of each feed-forward layer, of 2 MiB in fp32."""
CPU = ("engine.offload_optimizer=cpu", "engine.offload_parameters=cpu")
AGAIN = "activation.mode=full"
pytestmark = pytest.mark.deepspeed


def in_files(place: Path, optimizer: str = "cpu") -> tuple[str, ...]:
    return ("engine.offload_parameters=nvme", f"engine.offload_optimizer={optimizer}", f"engine.nvme_path={place / 'disk'}")


def written(place: Path, name: str, dtype: str, ranks: int) -> list[int]:
    """How many parameters each rank has in files, of one megabyte each."""
    folder = place / "disk" / name / "zero_stage_3" / f"{dtype}params"
    files = [list((folder / f"rank{rank}").iterdir()) for rank in range(ranks)]
    assert {path.stat().st_size for rank in files for path in rank} == {2**20}
    return [len(rank) for rank in files]


def go(place: Path, name: str, *how: str, steps: int, ranks: int) -> Path:
    """Train, or train on, until `steps`, with a step that is skipped; evaluating and writing text on the way."""
    config = tiny_config(
        place, *COMMON, SIZES, "train.eval_every=1", "train.sample_every=2", "optim.lr=0.001", f"name={name}",
        f"train.steps={steps}", *how,
    )  # fmt: skip

    def run(world: World) -> int:
        use_python()
        return uneven_run(world, config)

    assert on_ranks(run, ranks, place / "ranks") == [0] * ranks
    return place / "runs" / name


def test_from_given_weights_through_both_engines_to_an_export(tmp_path: Path) -> None:
    start = go(tmp_path, "start", steps=1, ranks=1)
    assert distllm(["export", str(start), str(tmp_path / "weights")]) == 0
    given = f"model={{path: {tmp_path / 'weights'}}}"
    one = go(tmp_path, "one", given, steps=5, ranks=1)
    go(tmp_path, "two", given, *zero(3), *in_files(tmp_path), steps=2, ranks=2)
    assert written(tmp_path, "two", "float32", 2) == [6, 6]
    go(tmp_path, "two", given, steps=3, ranks=1)
    two = go(tmp_path, "two", given, *zero(3), *in_files(tmp_path, "nvme"), steps=5, ranks=2)
    assert [line["skipped"] for line in metrics(two) if "loss" in line] == [0, 0, 1, 1, 1]
    assert_equal_runs(two, one)
    evaluations = [[line["val_loss"] for line in metrics(run) if "val_loss" in line] for run in (two, one)]
    assert len(evaluations[0]) == 5
    np.testing.assert_allclose(evaluations[0][-1], evaluations[1][-1], rtol=0, atol=2e-6)  # the last is of all samples
    for run in (one, two):
        assert distllm(["export", str(run), str(tmp_path / f"export-{run.name}")]) == 0
    ours, expected = (load_file(tmp_path / f"export-{name}" / "model.safetensors") for name in ("two", "one"))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=5e-6, err_msg=name)


@pytest.mark.parametrize(("precision", "files"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_one_rank_that_recomputes_does_what_it_does_in_memory_to_the_bit(precision: str, files: str, tmp_path: Path) -> None:
    how = (*zero(3), f"precision.compute={precision}", AGAIN)
    kept = go(tmp_path, "kept", *how, *CPU, steps=4, ranks=1)
    go(tmp_path, "broken", *how, *in_files(tmp_path), steps=2, ranks=1)
    broken = go(tmp_path, "broken", *how, *in_files(tmp_path), steps=4, ranks=1)
    assert losses(broken) == losses(kept)
    ours, expected = state(broken), state(kept)
    assert ours.keys() == expected.keys() and all(np.array_equal(ours[name], value) for name, value in expected.items())
    folder = tmp_path / "disk" / "broken" / "zero_stage_3" / f"{files}params" / "rank0"
    assert len(list(folder.iterdir())) == 6


def test_with_tp_a_block_is_read_as_a_whole(tmp_path: Path) -> None:
    one = go(tmp_path, "one", steps=4, ranks=1)
    how = (*zero(3), "layout.tp=2", "engine.offload_optimizer=none", *in_files(tmp_path)[::2])
    assert_equal_runs(go(tmp_path, "two", *how, steps=4, ranks=2), one)
    assert written(tmp_path, "two", "float32", 2) == [6, 6]


def asked_for(world: World, config: Config) -> tuple[FileBuffers, float]:
    """The buffers of a run that is built and takes no step; and what an update writes from, in parts of all parameters."""
    use_python()
    asked: list[FileBuffers] = []

    def seen(config: Config, *, ranks: int, buffers: FileBuffers) -> object:
        asked.append(buffers)
        return deepspeed_json(config, ranks=ranks, buffers=buffers)

    builder.deepspeed_json = seen  # type: ignore[assignment]
    run = build(config, world)
    parameters: list[Any] = list(run.engine._model.parameters())  # type: ignore[attr-defined]
    room = parameters[0].nvme_swapper.partitioned_swap_buffer.numel()
    return asked[0], room / sum(parameter.ds_numel for parameter in parameters)


GPT2 = ("model.type=gpt2", "model.sizes={n_embd: 256, n_inner: 2048, n_layer: 2, n_head: 4, n_positions: 2048}")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ((SIZES,), FileBuffers(1, 2**18)),
        ((SIZES, AGAIN), FileBuffers(2, 2**18)),
        ((SIZES, "layout.tp=2"), FileBuffers(3, 2**18)),
        ((*GPT2,), FileBuffers(2, 2**18)),  # the places' embedding is held until the end of a backward pass
        ((*GPT2, "layout.tp=2"), FileBuffers(3, 2**19)),
        ((), FileBuffers(1, 1)),
    ],
)
def test_what_is_printed_before_there_are_ranks_is_what_they_ask_for(
    how: tuple[str, ...], expected: FileBuffers, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, *COMMON, *zero(3), *in_files(tmp_path), *how)
    assert predicted_buffers(config, ranks=2) == expected
    asked = on_ranks(lambda world: asked_for(world, config), 2, tmp_path / "ranks")
    assert [buffers for buffers, _ in asked] == [expected] * 2
    # DeepSpeed would take room for whole parameters of a group; with tp these are pieces, which no other rank has.
    limit = 1.01 if config.layout.tp == 2 else 0.51
    assert config.model.sizes.get("intermediate_size") != 2048 or all(room < limit for _, room in asked)


def test_an_update_has_room_for_a_ranks_parts_of_any_group() -> None:
    assert parts_to_reserve([1000, 3], ranks=2) == [500, 2, 1]
    mebibyte = 2**18 + 1  # numbers of fp32
    largest, other = [4096 * mebibyte], [mebibyte] * 4095
    padded = [sum(-(-part // 256) * 256 for part in parts) for parts in (largest, other, parts_to_reserve(largest, ranks=1))]
    assert sum(other) < sum(largest) and padded[0] < padded[1] <= padded[2]


def test_the_memory_that_is_locked_is_known_before() -> None:
    zero = {"offload_param": {"device": "nvme", "nvme_path": "/disk", "buffer_count": 3, "buffer_size": 2**20}}
    json = {"zero_optimization": zero, "bf16": {"enabled": True}, "fp16": {"enabled": False}}
    model = torch.nn.Sequential(torch.nn.Linear(8, 64, bias=False), torch.nn.Linear(64, 2, bias=False))
    assert least_locked(json, model, key="engine.offload_parameters", ranks=2) == 6 * 2**20
    assert least_locked(json, model, key="engine.offload_optimizer", ranks=2) == 16 * 8 * 64 // 2
