"""The table of what cannot combine, and the arithmetic of layout and batch."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distllm.config.check import Resolved, check, ranks_for, resolve_layout, resolved_config
from distllm.config.errors import ConfigError
from distllm.config.load import load
from distllm.config.schema import Config


def configured(folder: Path, *overrides: str) -> Config:
    file = folder / "run.yaml"
    file.write_text("name: a\n")
    return load(file, overrides).config


def test_the_defaults_are_sound() -> None:
    for world in (None, 1, 2, 3, 1024):
        assert check(Config(), world_size=world) == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("model.type=null", "model.type=null: exactly one of model.type, model.path and model.spec must be set; nearest: llama"),
        ("model.type=gpt2 model.path=x", "model.type=gpt2: exactly one of model.type, model.path and model.spec must be set, and there is also model.path; nearest: model.type=null"),
        ("model.spec=foo", "model.spec=foo: must be package.module:function; nearest: my_package.my_module:make_spec"),
        ("model.spec=a.b:c model.sizes.x=1", "model.sizes={x: 1}: is for model.type and model.path; nearest: model.spec_args"),
        ("model.type=gpt2 model.spec_args.x=1", "model.spec_args={x: 1}: is for model.spec; nearest: model.sizes"),
        ("model.attention=flash_attention_2 precision.compute=bf16 data.cross_documents=false", "model.attention=flash_attention_2: takes no mask, which data.cross_documents=false needs; nearest: sdpa"),
        ("model.trust_remote_code=true", "model.trust_remote_code=true: is for model.path, where code can come with a model; nearest: false"),
        ("model.attention=flash_attention_2 device=cpu", "model.attention=flash_attention_2: needs a GPU, and device is cpu; nearest: sdpa"),
        ("model.attention=flash_attention_2", "model.attention=flash_attention_2: computes in bf16 or fp16 only; nearest: sdpa, or precision.compute=bf16"),
        ("model.sizes.n_positions=64", "data.seq_len=256: must be at most model.sizes.n_positions=64; nearest: 64"),
        ("model.sizes.vocab_size=500", "model.sizes.vocab_size=500: must hold every id of the tokenizer; nearest: 8192"),
        ("layout.pp=4 model.sizes.num_hidden_layers=2", "layout.pp=4: 4 stages need a block each, and model.sizes has 2; nearest: 2"),
        ("layout.pp=2 layout.pp_schedule=zbv model.sizes.n_layer=3", "layout.pp=2: 4 stages need a block each, and model.sizes has 3; nearest: 1"),
        ("layout.pp=2 layout.pp_split=[1, 2, 1]", "layout.pp_split=[1, 2, 1]: must have a number for each of the 2 stages; nearest: []"),
        ("layout.pp=2 train.batch_ramp=64", "train.batch_ramp=64: begins with one micro-batch a rank, and 1f1b needs its number of them; nearest: 0, or layout.pp_schedule=gpipe"),
        ("layout.tp=2 train.seq_ramp=64 data.seq_len=72 train.seq_ramp_from=9", "train.seq_ramp_from=9: sequence_parallel cuts the first rows over layout.tp=2, which must divide them; nearest: 10, or layout.sequence_parallel=false"),
        ("layout.pp=2 layout.pp_split=[1, 4] model.sizes.n_layer=4", "layout.pp_split=[1, 4]: must add up to the model's 4 blocks; nearest: []"),
        ("data.sources=[]", "data.sources=[]: must hold at least one source; nearest: [{kind: embedded}]"),
        ("data.sources.0.path=a.jsonl", "data.sources.0.path=a.jsonl: the embedded source has no path; nearest: data.sources.0.kind=jsonl"),
        ("data.sources.0.kind=csv", "data.sources.0.path=null: kind csv needs a path; nearest: data.sources.0.kind=embedded"),
        ("data.validation.sources=[{kind: text}]", "data.validation.sources.0.path=null: kind text needs a path; nearest: data.validation.sources.0.kind=embedded"),
        ("data.sources=[{kind: text, path: x, column: body}]", "data.sources.0.column=body: is for kind csv, hub, jsonl, parquet, tsv, not text; nearest: text"),
        ("data.sources=[{kind: tokens, path: x.bin}] data.tokenizer.kind=bytes", "data.sources.0.path=x.bin: is the path without its ending; nearest: x"),
        ("data.sources=[{kind: tokens, path: x}]", "data.tokenizer.kind=bpe: a source of kind tokens is already tokenised, so the tokenizer cannot be learned from it; nearest: hf with data.tokenizer.path, or bytes"),
        ("data.tokenizer.kind=hf", "data.tokenizer.path=null: kind hf needs a folder, a tokenizer.json or a hub name; nearest: data.tokenizer.kind=bpe"),
        ("data.tokenizer.path=x", "data.tokenizer.path=x: is for kind hf, not bpe; nearest: data.tokenizer.kind=hf"),
        ("data.validation.fraction=1", "data.validation.fraction=1.0: must be below 1, or nothing is left to train on; nearest: 0.5"),
        ("data.validation.fraction=0", "data.validation.fraction=0.0: must be above 0, or there is nothing to evaluate on; nearest: 0.001, or data.validation.sources"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1=1.0: must be below 1; nearest: 0.999"),
        ("optim.momentum=1", "optim.momentum=1.0: must be below 1; nearest: 0.9"),
        ("optim.name=lion optim.implementation=fused", "optim.implementation=fused: lion has no fused update; nearest: foreach"),
        ("train.steps=100 schedule.warmup=100", "schedule.warmup=100: must be below train.steps=100; nearest: 99"),
        ("schedule.name=wsd schedule.warmup=900", "schedule.decay_fraction=0.2: with schedule.warmup=900 of train.steps=1000 at most 0.1 is left to decay in; nearest: 0.1"),
        ("schedule.name=wsd schedule.decay_fraction=0", "schedule.decay_fraction=0.0: wsd needs a decay; nearest: 0.1"),
        ("checkpoint.every=300 checkpoint.keep_every=1000", "checkpoint.keep_every=1000: must be a multiple of checkpoint.every=300; nearest: 900"),
        ("checkpoint.every=0 checkpoint.keep_every=5", "checkpoint.keep_every=5: needs checkpoint.every, which is 0; nearest: 0, or checkpoint.every=5"),
        ("precision.tf32=true device=cpu", "precision.tf32=true: is for GPUs, and device is cpu; nearest: false"),
        ("out=", "out='': must not be empty; nearest: runs"),
        ("layout.dp_shard=1 layout.cp_method=ulysses", "layout.cp_method=ulysses: says how layout.cp works, which is 1; nearest: ring"),
        ("layout.pp=2 train.accumulation=2 model.type=null model.path=x tune.train=top", "layout.pp=2: every stage must learn, and tune.train=top; nearest: 1, with layout.dp_shard"),
        ("layout.pp=2 train.accumulation=2 model.type=null model.path=x tune.train=lora", "layout.pp=2: adapters are not cut into stages, and tune.train=lora; nearest: 1, with layout.dp_shard"),
        ("layout.tp=2 layout.loss_parallel=false distill.teacher=x distill.hidden=1", "layout.sequence_parallel=true: distill.hidden compares the states between blocks, which it cuts; nearest: false"),
        ("layout.dp_replicate=auto", "layout.dp_replicate=auto: only one of dp_replicate and dp_shard can be auto; nearest: 1"),
        ("train.global_batch=12", "train.global_batch=12: must be a multiple of micro_batch 8; nearest: 16"),
        ("train.global_batch=40 train.accumulation=2", "train.global_batch=40: must be a multiple of micro_batch 8 x accumulation 2 = 16; nearest: 48, or train.accumulation=auto"),
    ],
)  # fmt: skip
def test_what_cannot_combine_is_told_in_one_line(tmp_path: Path, overrides: str, line: str) -> None:
    given = re.split(r" (?=[\w.]+=)", overrides)
    assert check(configured(tmp_path, *given), world_size=None) == [line]


def test_all_problems_come_together(tmp_path: Path) -> None:
    config = configured(tmp_path, "model.type=null", "schedule.warmup=5000", "layout.tp=3", "optim.momentum=1", "out=")
    assert [line.partition("=")[0] for line in check(config, world_size=2)] == ["model.type", "optim.momentum", "schedule.warmup", "out", "data.seq_len", "layout.tp"]


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        ("", 4, (1, 4, 8, 1, 32)),
        ("layout.dp_replicate=2", 4, (2, 2, 8, 1, 32)),
        ("layout.dp_replicate=auto layout.dp_shard=1", 4, (4, 1, 8, 1, 32)),
        ("layout.dp_replicate=2 layout.dp_shard=2 train.global_batch=64", 4, (2, 2, 8, 2, 64)),
        ("train.micro_batch=3 train.accumulation=5", 2, (1, 2, 3, 5, 30)),
        ("train.micro_batch=3 train.accumulation=5 train.global_batch=30", 2, (1, 2, 3, 5, 30)),
    ],
)
def test_auto_is_settled(tmp_path: Path, overrides: str, world: int, expected: tuple[int, ...]) -> None:
    replicate, shard, micro, accumulation, batch = expected
    config = configured(tmp_path, *overrides.split())
    assert resolve_layout(config, world) == Resolved(
        dp_replicate=replicate, dp_shard=shard, cp=1, tp=1, pp=1, ep=1, dp_size=replicate * shard,
        micro_batch=micro, accumulation=accumulation, global_batch=batch,
    )  # fmt: skip
    assert check(config, world_size=world) == []


@pytest.mark.parametrize(
    ("overrides", "world", "line"),
    [
        ("layout.dp_replicate=3", 4, "layout.dp_replicate=3: must divide the 4 processes; nearest: 2"),
        ("layout.dp_replicate=auto layout.dp_shard=8", 6, "layout.dp_shard=8: must divide the 6 processes; nearest: 6"),
        ("layout.dp_replicate=2 layout.dp_shard=3", 4, "layout.dp_shard=3: dp_replicate 2 x dp_shard 3 = 6 must equal the 4 processes; nearest: layout.dp_shard=2"),
        ("layout.dp_replicate=2 layout.dp_shard=3", 1, "layout.dp_shard=3: dp_replicate 2 x dp_shard 3 = 6 must equal the 1 process; nearest: layout.dp_replicate=1 layout.dp_shard=1"),
        ("train.global_batch=60", 2, "train.global_batch=60: must be a multiple of micro_batch 8 x data-parallel 2 = 16; nearest: 64, or train.micro_batch=6"),
        ("train.global_batch=3", 2, "train.global_batch=3: must be a multiple of micro_batch 8 x data-parallel 2 = 16; nearest: 16"),
        ("train.global_batch=32 train.accumulation=4", 2, "train.global_batch=32: must be micro_batch 8 x accumulation 4 x data-parallel 2 = 64; nearest: 64, or train.accumulation=2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_world_names_what_does(tmp_path: Path, overrides: str, world: int, line: str) -> None:
    config = configured(tmp_path, *overrides.split())
    assert check(config, world_size=world) == [line]
    with pytest.raises(ConfigError) as caught:
        resolve_layout(config, world)
    assert caught.value.problems == [line]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("train.accumulation=2", "train.accumulation=2: 1f1b over layout.pp=4 needs at least 4 micro-batches a step; nearest: 4, or layout.pp_schedule=gpipe"),
        ("train.global_batch=8 layout.pp_schedule=dualpipev", "train.accumulation=1: dualpipev over layout.pp=4 needs at least 8 micro-batches a step; nearest: 8 with train.global_batch=64, or layout.pp_schedule=gpipe"),
        ("train.accumulation=8 layout.pp_schedule=csv layout.pp_csv=none.csv", "layout.pp_csv=none.csv: no such file; nearest: the folder HERE, or layout.pp_schedule=1f1b"),
    ],
)  # fmt: skip
def test_a_schedule_is_told_what_it_lacks_before_ranks_start(tmp_path: Path, overrides: str, line: str) -> None:
    told = check(configured(tmp_path, "layout.pp=4", *overrides.split()), world_size=4)
    assert [problem.replace(str(Path.cwd()), "HERE") for problem in told] == [line]


def test_every_nearest_batch_is_legal(tmp_path: Path) -> None:
    for world in (1, 2, 3, 4):
        for batch in range(1, 50, 3):
            for line in check(configured(tmp_path, f"train.global_batch={batch}"), world_size=world):
                for way in line.partition("; nearest: ")[2].split(", or "):
                    override = way if "=" in way else f"train.global_batch={way}"
                    assert check(configured(tmp_path, f"train.global_batch={batch}", override), world_size=world) == []


def test_a_pinned_batch_stays_on_another_world(tmp_path: Path) -> None:
    pinned = resolved_config(configured(tmp_path, "train.micro_batch=2", "train.accumulation=4"), 2)
    assert [resolve_layout(pinned, world).global_batch for world in (1, 2, 4)] == [16, 16, 16]
    assert [resolve_layout(pinned, world).accumulation for world in (1, 2, 4)] == [8, 4, 2]


@pytest.mark.parametrize(
    ("overrides", "devices", "ranks"),
    [("", 0, 1), ("", 8, 8), ("layout.dp_shard=1", 8, 1), ("layout.dp_replicate=2", 0, 2), ("layout.dp_replicate=2", 8, 8),
     ("layout.dp_replicate=2 layout.dp_shard=2", 8, 4)],
)  # fmt: skip
def test_how_many_ranks_start_here(tmp_path: Path, overrides: str, devices: int, ranks: int) -> None:
    assert ranks_for(configured(tmp_path, *overrides.split()), devices=devices) == ranks
