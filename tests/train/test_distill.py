"""Distillation: its terms against torch's, the teacher left as it is, and the same training on any ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.config.schema import Config, DataConfig, DistillConfig, PrecisionConfig, TaskConfig, TrainConfig
from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms
from distllm.models.build import initial_tensors
from distllm.models.spec import ModelSpec
from distllm.train.distill import (
    Teacher,
    build_teacher,
    check_teacher,
    distilled,
    hidden_loss,
    showing_states,
    soft_loss,
    teacher_width,
    without_projection,
)
from distllm.train.objectives import causal_lm, classification
from tests.engines import Layout, engine_of, mesh_of, train
from tests.models.heads import VOCABULARY, head_spec
from tests.ranks import on_ranks
from tests.toy import toy_spec, toy_tensors

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("few", [False, True])
def test_soft_loss_is_torchs_divergence_where_there_are_labels(few: bool) -> None:
    own, other = drawn(3, 4, 7, seed=0).requires_grad_(), drawn(3, 4, 7, seed=1)
    labels = torch.tensor([[1, IGNORE, 2, IGNORE], [IGNORE] * 4, [0, 1, 2, 3]])
    found = soft_loss(own, other, labels, temperature=3.0, few=few)
    kept = labels != IGNORE
    divergence = nn.KLDivLoss(reduction="sum")
    expected = 9.0 * divergence((own[kept] / 3.0).log_softmax(-1), (other[kept] / 3.0).softmax(-1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, own), torch.autograd.grad(expected, own))


def test_ids_that_one_embedding_alone_has_do_not_count() -> None:
    own, other, labels = drawn(2, 5, seed=0), drawn(2, 8, seed=1), torch.tensor([0, 1])
    found = soft_loss(own, other, labels, temperature=1.0, few=False)
    torch.testing.assert_close(found, soft_loss(own, other[:, :5], labels, temperature=1.0, few=False))


def test_a_teacher_in_fp64() -> None:
    """No autocast, which knows no fp64, and no loss of seven digits."""
    teacher = build_teacher(
        toy_spec(), tensors=toy_tensors(), mesh=mesh_of(World(0, 1, 0, 1, CPU), "one"), device=CPU, compute_dtype=torch.float64,
        hidden=False,
    )  # fmt: skip
    logits = teacher({"input_ids": torch.arange(6)[None]})
    assert logits.dtype == torch.float64
    assert soft_loss(logits, logits + 1, torch.arange(6)[None], temperature=2.0, few=False).dtype == torch.float64


def answering(logits: torch.Tensor) -> Teacher:
    """A teacher that always answers the same."""
    return lambda inputs: SimpleNamespace(logits=logits)  # type: ignore[return-value]


def test_the_loss_mixes_task_and_teacher_and_validation_tells_the_task_alone() -> None:
    own, other = drawn(4, 3, seed=0), drawn(4, 3, seed=1)
    batch = Batch({}, {"labels": torch.tensor([0, 2, IGNORE, 1])}, ())
    config = DistillConfig(temperature=2.0, alpha=0.3)
    objective = distilled(classification, teacher=answering(other), config=config, kind="classification")
    hard = classification(own, batch)
    soft = soft_loss(own, other, batch.targets["labels"], temperature=2.0, few=False)
    mixed = objective(own, batch)
    torch.testing.assert_close(mixed.sum, 0.7 * hard.sum + 0.3 * soft)
    assert int(mixed.count) == 3 and not mixed.parts
    with torch.no_grad():
        told = objective(own, batch)
    torch.testing.assert_close(told.sum, hard.sum)
    torch.testing.assert_close(told.parts["soft"], soft)
    torch.testing.assert_close(told.parts["hard"], hard.sum)
    assert "confusion" in told.parts


def states_of(blocks: int, *, seed: int) -> tuple[torch.Tensor, ...]:
    return tuple(drawn(2, 3, 5, seed=seed + i) for i in range(blocks + 1))


def test_hidden_states_of_blocks_are_matched_evenly_over_attended_places() -> None:
    own, other = states_of(2, seed=0), states_of(4, seed=10)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    labels = torch.tensor([[5, IGNORE, IGNORE], [1, 2, 3]])
    batch = Batch({"attention_mask": mask}, {"labels": labels}, ())
    found = hidden_loss(SimpleNamespace(hidden_states=own), SimpleNamespace(hidden_states=other), batch)
    expected = 0.0
    for a, b in ((own[1], other[2]), (own[2], other[4])):
        expected += float((a[0, :2] - b[0, :2]).square().mean() * 1 + (a[1] - b[1]).square().mean() * 3) / 2
    assert float(found) == pytest.approx(expected)
    # One label a row; a mask of documents counts every place; a row without a label counts nothing.
    rows = Batch({"attention_mask": torch.ones(2, 1, 3, 3)}, {"labels": torch.tensor([4, IGNORE])}, ())
    found = hidden_loss(SimpleNamespace(hidden_states=own), SimpleNamespace(hidden_states=other), rows)
    expected = float((own[1][0] - other[2][0]).square().mean() + (own[2][0] - other[4][0]).square().mean()) / 2
    assert float(found) == pytest.approx(expected)


def test_more_blocks_than_the_teachers_share_its() -> None:
    own, other = states_of(3, seed=0), states_of(2, seed=10)
    batch = Batch({}, {"labels": torch.tensor([0, 1])}, ())
    found = hidden_loss(SimpleNamespace(hidden_states=own), SimpleNamespace(hidden_states=other), batch)
    pairs = ((own[1], other[1]), (own[2], other[2]), (own[3], other[2]))
    assert float(found) == pytest.approx(sum(float((a - b).square().mean((1, 2)).sum()) for a, b in pairs) / 3)


# ---------------------------------------------------------------------------------------------------------------------
# With transformers models on ranks


DISTILL = DistillConfig(teacher="t", temperature=2.0, alpha=0.5, hidden=0.5)


@pytest.fixture(scope="module")
def specs() -> tuple[ModelSpec, ModelSpec]:
    """A student of 2 blocks of width 16 and a teacher of 4 of width 32."""
    sizes = {"n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    teacher = head_spec("gpt2", "causal_lm", n_layer=4, n_embd=32, **(sizes | {"resid_pdrop": 0.4}))
    student = head_spec("gpt2", "causal_lm", n_layer=2, n_embd=16, **sizes)
    return showing_states(student, width=teacher_width(teacher)), teacher


def batch_of(ids: Sequence[int]) -> Batch:
    """Rows of text with labels at a part of their places; -1 is a row of padding."""
    draw = np.random.default_rng(0).integers(0, VOCABULARY, (40, 17))
    rows = torch.from_numpy(draw)[list(ids)]
    labels = torch.where(rows[:, 1:] % 3 == 0, IGNORE, rows[:, 1:])
    labels[torch.tensor(ids) < 0] = IGNORE
    return Batch({"input_ids": rows[:, :-1]}, {"labels": labels}, tuple(ids))


def trained(
    specs: tuple[ModelSpec, ModelSpec], layout: Layout, accumulation: int, world: World, *, compute: str = "fp32"
) -> dict[str, Any]:
    """Two steps of 7 samples in 8 rows under a teacher, and what the teacher is afterwards."""
    mesh, (student, spec) = mesh_of(world, layout), specs
    precision = PrecisionConfig(compute=compute)  # type: ignore[arg-type]
    teacher = build_teacher(
        spec, tensors=initial_tensors(spec, seed=8), mesh=mesh, device=world.device,
        compute_dtype=torch.bfloat16 if compute == "bf16" else torch.float32, hidden=True,
    )  # fmt: skip
    objective = distilled(causal_lm, teacher=teacher, config=DISTILL, kind="causal_lm")
    engine = engine_of(world, mesh, student, objective, precision=precision)
    result = train(engine, batch_of, size=7, step=8, accumulation=accumulation)
    terms: LossTerms = engine.eval_step(batch_of([20, 21]))
    held = [p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in teacher.parallel.model.parameters()]
    whole = {n: (p.full_tensor() if isinstance(p, DTensor) else p).numpy() for n, p in teacher.parallel.model.named_parameters()}
    gradients = [n for n, p in teacher.parallel.model.named_parameters() if p.grad is not None or p.requires_grad]
    return {
        **result, "parts": {n: float(p) for n, p in terms.parts.items()}, "held": sum(held), "teacher": whole,
        "learning": [*gradients, *(n for n, m in teacher.parallel.model.named_modules() if m.training)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(specs: tuple[ModelSpec, ModelSpec], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (result,) = on_ranks(partial(trained, specs, "one", 1), 1, tmp_path_factory.mktemp("alone"))
    return result


@pytest.mark.parametrize(
    ("layout", "ranks", "accumulation"), [("one", 1, 4), ("ddp", 2, 2), ("ddp", 4, 1), ("fsdp", 2, 2), ("hsdp", 4, 2)]
)
def test_any_layout_learns_the_same_from_the_same_teacher(
    specs: tuple[ModelSpec, ModelSpec], alone: dict[str, Any], layout: Layout, ranks: int, accumulation: int, tmp_path: Path
) -> None:
    found = on_ranks(partial(trained, specs, layout, accumulation), ranks, tmp_path)
    for rank in found:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert rank["parts"] == pytest.approx(alone["parts"], rel=1e-4)
        assert rank["learning"] == []
    for name, value in alone["weights"].items():
        np.testing.assert_allclose(found[0]["weights"][name], value, atol=2e-4, err_msg=name)
    whole = sum(value.size for value in alone["teacher"].values())
    shards = {"one": 1, "ddp": 1, "fsdp": ranks, "hsdp": 2}[layout]
    assert sum(rank["held"] for rank in found) == whole * ranks / shards


def test_the_teacher_stays_and_the_projection_learns(specs: tuple[ModelSpec, ModelSpec], alone: dict[str, Any]) -> None:
    student, teacher = specs
    for name, tensor in initial_tensors(teacher, seed=8):
        if name in alone["teacher"]:
            assert np.array_equal(alone["teacher"][name], tensor.numpy()), name
    first = dict(initial_tensors(student, seed=3))
    assert np.abs(alone["weights"]["distill_projection.weight"] - first["distill_projection.weight"].numpy()).max() > 1e-4
    assert set(alone["parts"]) == {"correct", "hard", "soft", "hidden"}
    exported = dict(without_projection((n, torch.from_numpy(t)) for n, t in alone["weights"].items()))
    plain = head_spec("gpt2", "causal_lm", n_layer=2, n_embd=16, n_head=2)
    assert set(exported) == {name for name, _ in initial_tensors(plain, seed=3)}
    assert not getattr(student.hf_config, "output_hidden_states", False)
    # The projection changes no other number of the student's.
    for name, tensor in initial_tensors(plain, seed=3):
        assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("fsdp", 2)])
def test_in_bf16(specs: tuple[ModelSpec, ModelSpec], alone: dict[str, Any], layout: Layout, ranks: int, tmp_path: Path) -> None:
    found = on_ranks(partial(trained, specs, layout, 1, compute="bf16"), ranks, tmp_path)
    assert found[0]["losses"] == pytest.approx(alone["losses"], rel=2e-2)
    assert found[0]["losses"] != pytest.approx(alone["losses"], rel=1e-6)


def test_an_encoder_decoder_matches_both_stacks() -> None:
    specs = [showing_states(head_spec("bart", "seq2seq"), width=width) for width in (48, None)]
    ids = torch.arange(4, 12)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :3]}
    torch.manual_seed(0)
    outputs = [spec.build().eval()(**inputs) for spec in specs]
    assert [state.shape[-1] for state in outputs[0].encoder_hidden_states] == [32, 48, 48]
    assert [state.shape[-1] for state in outputs[0].decoder_hidden_states] == [32, 48, 48, 48]
    assert [state.shape[-1] for state in outputs[1].decoder_hidden_states] == [32] * 4
    batch = Batch(inputs, {"labels": ids[:, :3]}, ())
    torch.manual_seed(1)
    twin = specs[1].build().eval()(**inputs)
    loss = hidden_loss(outputs[1], twin, batch)
    pairs = [
        *zip(outputs[1].encoder_hidden_states[1:], twin.encoder_hidden_states[1:], strict=True),
        *zip(outputs[1].decoder_hidden_states[1:], twin.decoder_hidden_states[1:], strict=True),
    ]
    assert loss.item() == pytest.approx(3 * sum((a - b).square().mean().item() for a, b in pairs) / 5, rel=1e-5)


def test_a_teacher_without_token_types_is_not_given_any() -> None:
    teacher = build_teacher(
        toy_spec(), tensors=toy_tensors(), mesh=mesh_of(World(0, 1, 0, 1, CPU), "one"), device=CPU,
        compute_dtype=torch.float32, hidden=False,
    )  # fmt: skip
    ids = torch.arange(4, 12)[None]
    logits = teacher({"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
    assert logits.shape == (1, 8, 37) and not logits.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


def config_of(kind: str = "classification", *, compile: bool = False, **distill: Any) -> Config:
    return Config(
        task=TaskConfig(kind=kind), distill=DistillConfig(teacher="runs/t", **distill), data=DataConfig(seq_len=64),  # type: ignore[arg-type]
        train=TrainConfig(compile=compile),
    )  # fmt: skip


OWN = ModelSpec(name="own", build=nn.Identity, init=lambda module: None, blocks=())
OTHER = replace(OWN, name="other", max_seq_len=32)
REFUSED: list[tuple[Config, dict[str, Any], str]] = [
    (config_of("regression"), {}, "distill.teacher=runs/t: not with task.kind=regression; .*"),
    (config_of(), {"tokenizers": ("a", "b")}, "distill.teacher=runs/t: has another tokenizer.*"),
    (config_of(), {"labels": (["x", "y"], ["x"])}, "distill.teacher=runs/t: has 1 labels and the student 2.*"),
    (config_of(), {"labels": (["x", "y"], ["y", "x"])}, r".*calls a label 'y' that is 'x' here; use task.labels=\[y, x\]"),
    (config_of(), {"teacher": OTHER}, "distill.teacher=runs/t: takes at most 32 tokens; use data.seq_len=32"),
    (config_of(hidden=0.5), {"student": OWN}, "distill.hidden=0.5: the student, own, is no model of transformers.*"),
    (config_of(hidden=0.5, compile=True), {}, "distill.hidden=0.5: not with train.compile=true.*"),
]


@pytest.mark.parametrize(("config", "given", "line"), REFUSED)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(config: Config, given: dict[str, Any], line: str) -> None:
    fits = replace(OWN, hf_config=object())
    arguments = {"student": fits, "teacher": fits, "tokenizers": ("a", "a")} | given
    with pytest.raises(ConfigError) as refused:
        check_teacher(config, **arguments)
    (problem,) = refused.value.problems
    assert "\n" not in problem
    assert re.fullmatch(line, problem), problem


def test_a_teacher_that_fits() -> None:
    labels = (["a", "b"], ["a", "b"])
    check_teacher(config_of(), student=OWN, teacher=OWN, tokenizers=("a", "a"), labels=labels)
