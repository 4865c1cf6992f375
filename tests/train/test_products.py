"""A run on shard x tensor x pipeline, continued on other layouts: the losses of one process, and an export that agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distllm.comm import World
from distllm.config.schema import Config
from distllm.train.inference import export_source
from tests.ranks import on_ranks
from tests.runs import losses, metrics, run_tiny, tiny_config

SIZES = (
    '{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, '
    '"tie_word_embeddings": true}'
)
BASE = (
    f"model.sizes={SIZES}", "optim.name=sgd", "optim.lr=0.05", "train.steps=6", "train.eval_every=3",
    "train.sample_every=3", "train.eval_batches=0",
    "checkpoint.every=3", "checkpoint.keep=10", "schedule.name=constant",
)  # fmt: skip
CUBE = ("layout.dp_shard=2", "layout.tp=2", "layout.pp=2", "train.micro_batch=1")


def trained(folder: Path, ranks: int, *overrides: str) -> Path:
    """Train on so many ranks; the run's folder."""
    config: Config = tiny_config(folder, *BASE, *overrides)

    def rank(world: World) -> int:
        return run_tiny(world, config)

    assert set(on_ranks(rank, ranks, folder / f"ranks-{config.name}")) == {0}
    return folder / "runs" / config.name


def assert_same(run: Path, reference: Path, *, after: int = 0) -> None:
    found, wanted = losses(run), {step: loss for step, loss in losses(reference).items() if step > after}
    assert found.keys() >= wanted.keys()
    for step, loss in wanted.items():
        assert abs(found[step] - loss) < 2e-6, (step, found[step], loss)
    values = [{r["step"]: r["val_loss"] for r in metrics(folder) if "val_loss" in r} for folder in (run, reference)]
    assert values[1] and all(abs(values[0][step] - value) < 2e-6 for step, value in values[1].items() if step > after)


@pytest.mark.timeout(300)
def test_a_cube_of_ranks_is_saved_and_goes_on_as_shards_and_as_one_process(tmp_path: Path) -> None:
    one = trained(tmp_path, 1, "name=one", "layout.dp_shard=1")
    cube = trained(tmp_path, 8, "name=cube", *CUBE)
    assert_same(cube, one)
    assert (cube / "samples.txt").read_text() and losses(one)[1] - losses(one)[6] > 0.05
    middle = f"resume={cube / 'checkpoints' / 'step-3'}"
    assert_same(trained(tmp_path, 4, "name=shards", "layout.dp_shard=4", middle), one, after=3)
    assert_same(trained(tmp_path, 1, "name=alone", "layout.dp_shard=1", middle), one, after=3)
    exported = [load_file(export_source(str(run), tmp_path / f"{run.name}-hf") / "model.safetensors") for run in (one, cube)]
    assert exported[0].keys() == exported[1].keys()
    for name, value in exported[0].items():
        np.testing.assert_allclose(exported[1][name].numpy(), value.numpy(), rtol=0, atol=2e-6, err_msg=name)
    assert_loads(tmp_path / "cube-hf")


def assert_loads(folder: Path) -> None:
    """Plain transformers loads the export, and it is a model that has learned."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list(b"abc def ghi ")])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss < np.log(257)


@pytest.mark.parametrize(
    "layout",
    [
        ("layout.cp=2", "layout.dp_shard=1"),
        ("layout.pp=2", "layout.dp_replicate=2", "layout.dp_shard=1", "layout.pp_schedule=zbv"),
        ("layout.tp=2", "layout.dp_replicate=2", "layout.dp_shard=1", "precision.compute=bf16"),
    ],
    ids=lambda layout: "-".join(layout),
)
def test_other_layouts_train_evaluate_sample_and_save(layout: tuple[str, ...], tmp_path: Path) -> None:
    ranks = 2 if "layout.cp=2" in layout else 4
    one = trained(tmp_path, 1, "name=one", "layout.dp_shard=1", "train.micro_batch=1", *[w for w in layout if "precision" in w])
    run = trained(tmp_path, ranks, "name=laid", "train.micro_batch=1", *layout)
    if "precision.compute=bf16" in layout:
        assert abs(losses(run)[6] - losses(one)[6]) < 3e-2
    else:
        assert_same(run, one)
    again = trained(tmp_path, 1, "name=again", "layout.dp_shard=1", f"resume={run / 'checkpoints' / 'step-3'}")
    assert abs(losses(again)[6] - losses(one)[6]) < (3e-2 if "precision.compute=bf16" in layout else 2e-6)


EXPERTS = (
    "model.type=mixtral",
    'model.sizes={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, '
    '"num_key_value_heads": 2, "num_local_experts": 4, "tie_word_embeddings": true}',
    "moe.balance=0.1", "moe.z_loss=0.01", "train.micro_batch=1",
)  # fmt: skip


def norms(run: Path) -> list[float]:
    return [line["grad_norm"] for line in metrics(run) if "grad_norm" in line]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, ("layout.ep=2",)), (4, ("layout.ep=2", "layout.pp=2")), (4, ("layout.cp=2", "layout.tp=2"))],
    ids=str,
)
def test_experts_are_balanced_alike_under_any_layout(ranks: int, layout: tuple[str, ...], tmp_path: Path) -> None:
    plain = trained(tmp_path, 1, "name=plain", *EXPERTS, "moe.balance=0", "moe.z_loss=0", "layout.dp_shard=1", "train.steps=3")
    one = trained(tmp_path, 1, "name=one", *EXPERTS, "layout.dp_shard=1")
    assert abs(norms(one)[0] - norms(plain)[0]) > 1e-4  # the losses of the routers are in the gradient
    run = trained(tmp_path, ranks, "name=laid", *EXPERTS, "layout.dp_shard=1", *layout)
    assert_same(run, one)
    np.testing.assert_allclose(norms(run), norms(one), rtol=1e-5)
    middle = f"resume={run / 'checkpoints' / 'step-3'}"
    assert_same(trained(tmp_path, 1, "name=alone", *EXPERTS, "layout.dp_shard=1", middle), one, after=3)
