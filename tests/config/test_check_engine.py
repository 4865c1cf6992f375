"""What DeepSpeed cannot do is refused by name, and the JSON that it is given leaves nothing open."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distllm.config.check import check
from distllm.config.deepspeed_json import FileBuffers, deepspeed_json
from distllm.config.errors import ConfigError
from distllm.config.load import load

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
DEEPSPEED = "engine.name=deepspeed"
STATE_ALONE = "DeepSpeed's pipeline shards optimizer state alone, and layout.pp=2; nearest: 1, or engine.name=native"
STAGE_3 = "needs engine.zero_stage=3, and it is 1"
WHOLE = f"{STAGE_3}, where parameters are whole; nearest: none"


def problems(*overrides: str) -> list[str]:
    return check(load(QUICKSTART, list(overrides)).config)


def test_every_stage_of_zero_is_fine() -> None:
    for stage in (1, 2, 3):
        assert problems(DEEPSPEED, f"engine.zero_stage={stage}", "precision.compute=bf16") == []
    both = ("engine.offload_optimizer=cpu", "engine.offload_parameters=cpu")
    assert problems(DEEPSPEED, "engine.zero_stage=3", *both) == []
    assert problems(DEEPSPEED, "layout.tp=2", "device=cuda", "precision.compute=fp16") == []


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("engine.zero_stage=0", "1, or engine.name=native with layout.dp_replicate"),
        ("engine.zero_stage=4", "3"),
        ("engine.offload_optimizer=nvme", "cpu, or engine.zero_stage=3"),
        ("engine.offload_optimizer=nvme", "cpu"),
        ("engine.nvme_path=/disk", "null, engine.offload_optimizer=nvme, or engine.offload_parameters=nvme"),
        ("engine.offload_parameters=nvme", "none, or engine.zero_stage=3"),
        ("engine.offload_parameters=nvme", "cpu"),
        ("engine.offload_parameters=cpu", "none, or engine.zero_stage=3"),
        ("layout.cp=2", "1, or engine.name=native"),
        ("layout.ep=2", "1, or engine.name=native"),
        ("layout.dp_replicate=2", "1 with layout.dp_shard=auto, or engine.name=native"),
        ("layout.reshard_after_forward=false", "true, or engine.name=native"),
        ("precision.compute=fp16", "bf16"),
        ("precision.compute=fp64", "fp32, or engine.name=native"),
        ("train.batch_tokens=4096", "null, or engine.name=native"),
        ("train.batch_ramp=10", "0, or engine.name=native"),
        ("train.ema=0.9", "0.0, or engine.name=native"),
        ("train.compile=true", "false, or engine.name=native"),
        ("optim.l1=0.1", "0.0, or engine.name=native"),
        ("optim.l2=0.1", "0.0, or engine.name=native"),
        ("moe.balance=0.1", "0.0, or engine.name=native"),
        ("moe.z_loss=0.1", "0.0, or engine.name=native"),
        ("tune.train=head", "all, or engine.name=native"),
        ("track.noise_scale=true", "false, or engine.name=native"),
        ("distill.teacher=runs/big", "null, or engine.name=native"),
    ],
)
def test_what_it_cannot_do_is_refused_with_what_can(given: str, near: str) -> None:
    lines = [line for line in problems(DEEPSPEED, "device=cpu", given) if line.startswith(f"{given}: ")]
    assert [line.partition("; nearest: ")[2] for line in lines if line.endswith(f"; nearest: {near}")] == [near], lines


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("", None),
        ("layout.tp=2", None),
        ("engine.offload_optimizer=cpu", None),
        ("train.accumulation=1", None),
        ("engine.offload_parameters=cpu", WHOLE),
        ("engine.offload_optimizer=nvme engine.nvme_path=/disk", f"{STAGE_3}, where DeepSpeed takes nvme for cpu; nearest: cpu"),
        ("engine.zero_stage=2", STATE_ALONE),
        ("engine.zero_stage=3", STATE_ALONE),
        ("engine.offload_parameters=nvme engine.nvme_path=/disk", WHOLE),
        ("layout.pp_schedule=zbv", "DeepSpeed's pipeline has one schedule; nearest: 1f1b, or engine.name=native"),
        ("layout.pp_virtual=2", "1f1b has one stage a rank; nearest: 1, or layout.pp_schedule=interleaved_1f1b"),
    ],
)
def test_its_pipeline_needs_stage_1_and_has_one_schedule(given: str, rule: str | None) -> None:
    usual = (DEEPSPEED, "device=cpu", "engine.zero_stage=1", "layout.pp=2", "train.accumulation=4", "train.global_batch=null")
    config = load(QUICKSTART, [*usual, *given.split()]).config
    assert check(config, world_size=4) == ([] if rule is None else [f"{given.partition(' ')[0]}: {rule}"])


@pytest.mark.parametrize("optimizer", ["none", "cpu", "nvme"])
def test_parameters_in_files_go_with_any_place_of_the_optimizer(optimizer: str) -> None:
    nvme = [DEEPSPEED, "engine.zero_stage=3", "engine.offload_parameters=nvme", f"engine.offload_optimizer={optimizer}"]
    assert problems(*nvme, "engine.nvme_path=/disk") == []
    keys = ["parameters", *(["optimizer"] if optimizer == "nvme" else [])]
    wanted = [f"engine.offload_{key}=nvme: needs engine.nvme_path, a folder; nearest: cpu" for key in keys]
    assert sorted(problems(*nvme)) == sorted(wanted)


def test_parameters_in_files_have_the_buffers_that_the_model_needs_and_nothing_is_read_ahead() -> None:
    nvme = [DEEPSPEED, "engine.zero_stage=3", "engine.offload_parameters=nvme", "engine.nvme_path=/disk", "name=first"]
    zero = deepspeed_json(load(QUICKSTART, nvme).config, ranks=1, buffers=FileBuffers(count=3, size=70))["zero_optimization"]
    assert zero == {
        "stage": 3, "sub_group_size": 10**8, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0,
        "offload_param": {
            "device": "nvme", "nvme_path": "/disk/first", "buffer_count": 3, "buffer_size": 70, "max_in_cpu": 0,
        },
    }  # fmt: skip


def test_state_in_files_has_a_folder_of_the_runs_own_and_groups_of_its_size() -> None:
    nvme = [DEEPSPEED, "engine.zero_stage=3", "engine.offload_optimizer=nvme", "engine.nvme_path=/disk", "name=first"]
    assert problems(*nvme) == []
    zero = deepspeed_json(load(QUICKSTART, nvme).config, ranks=1)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "/disk/first"} and zero["sub_group_size"] == 10**8


def test_its_options_are_not_for_the_native_engine() -> None:
    (line,) = problems("engine.zero_stage=3")
    assert line == "engine.zero_stage=3: is for engine.name=deepspeed, not native; nearest: 2, or engine.name=deepspeed"


def test_the_json_spells_out_the_batch_and_has_no_auto() -> None:
    overrides = [DEEPSPEED, "engine.zero_stage=3", "engine.offload_parameters=cpu", "precision.compute=bf16"]
    batch = ["train.global_batch=16", "train.micro_batch=2", "train.accumulation=auto"]
    config = load(QUICKSTART, [*overrides, *batch]).config
    assert deepspeed_json(config, ranks=4) == {
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
        "gradient_clipping": config.optim.clip, "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
        "bf16": {"enabled": True}, "fp16": {"enabled": False, "loss_scale": 1.0}, "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"has no DeepSpeed JSON; nearest: engine.name=deepspeed"):
        deepspeed_json(load(QUICKSTART, []).config, ranks=1)


def test_explain_prints_it_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distllm", "explain", str(QUICKSTART), "--deepspeed", "--processes", "2"]
    done = subprocess.run([*command, DEEPSPEED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    config = load(QUICKSTART, [DEEPSPEED]).config
    assert json.loads(done.stdout) == deepspeed_json(config, ranks=2)
    files = ["engine.zero_stage=3", "engine.offload_parameters=nvme", "engine.nvme_path=/disk", f"data.store={tmp_path}"]
    early = subprocess.run([*command, DEEPSPEED, *files], capture_output=True, text=True, timeout=60)
    assert early.returncode == 3 and early.stdout == "" and "run `distllm prepare CONFIG` first" in early.stderr
    refused = subprocess.run([*command, DEEPSPEED, "layout.cp=2"], capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0 and refused.stdout == "" and "layout.cp=2" in refused.stderr
