"""A body with several heads: weights in and out, and the same training on any ranks, with tasks that a batch lacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from distllm.comm import World
from distllm.config.errors import ConfigError
from distllm.config.schema import Config, DataConfig, HeadConfig, ModelConfig, TaskConfig
from distllm.data.batch import IGNORE, Batch
from distllm.models.build import initial_tensors, meta_model, resolve_spec
from distllm.models.multi_task import multi_task_spec
from distllm.models.spec import ModelSpec
from distllm.parallel.parallelize import fill
from distllm.train.objectives import multi_task
from tests.engines import Layout, engine_of, mesh_of, train
from tests.models.heads import ENCODERS, ROLES, VOCABULARY, head_spec, rows
from tests.parallel.tensor_cases import Case, assert_close, enlarged, parallel_answer, reference
from tests.ranks import on_ranks

TASKS = {
    "topic": HeadConfig(kind="classification", weight=2.0),
    "score": HeadConfig(kind="regression"),
    "words": HeadConfig(kind="masked_lm", weight=0.5),
}
OUTPUTS = {"topic": 3, "score": 1}
NAMES = tuple(TASKS)


def spec_of(
    kind: str = "bert", *, tasks: dict[str, HeadConfig] | None = None, outputs: dict[str, int] | None = None, **model: Any
) -> ModelSpec:
    section = {"type": kind, "sizes": ENCODERS[kind], "dropout": 0.0} | model
    config = Config(
        task=TaskConfig(kind="multi_task", tasks=tasks or TASKS), model=ModelConfig(**section), data=DataConfig(seq_len=16)
    )
    return resolve_spec(config, vocab_size=VOCABULARY, labels=outputs or OUTPUTS, roles=ROLES)


def batch_of(ids: Sequence[int]) -> Batch:
    """The samples with these numbers, of tasks 0, 0, 1, 2, 0, 0, 1, 2 ...; -1 is a row of padding, of no task."""
    tokens, mask = rows(40, 16, seed=1)
    task = np.array([-1 if i < 0 else (0, 0, 1, 2)[i % 4] for i in ids])
    own = tokens[list(ids)].clone()
    attended = mask[list(ids)].clone()
    inputs: dict[str, torch.Tensor] = {"input_ids": own, "attention_mask": attended}
    targets: dict[str, torch.Tensor] = {}
    for number, name in enumerate(NAMES):
        mine = torch.from_numpy(np.flatnonzero(task == number))
        inputs[f"rows_{name}"] = mine
        if name == "words":
            labels = torch.where((own[mine] % 3 == 0) & (attended[mine] == 1), own[mine], IGNORE)
            labels[:, 1] = own[mine, 1]
            targets["labels_words"] = labels
            own[mine] = torch.where(labels != IGNORE, ROLES.mask or 0, own[mine])
        elif name == "topic":
            targets["labels_topic"] = own[mine, 1] % 3
        else:
            targets["labels_score"] = own[mine, 1] / VOCABULARY
            targets["weight_score"] = torch.ones(len(mine))
    return Batch(inputs, targets, tuple(ids))


def trained(spec: ModelSpec, layout: Layout, accumulation: int, world: World) -> dict[str, Any]:
    """Two steps of 7 samples in 8 rows; with one row a micro-batch, each lacks two tasks, and one has none."""
    engine = engine_of(world, mesh_of(world, layout), spec, partial(multi_task, tasks=TASKS))
    return train(engine, batch_of, size=7, step=8, accumulation=accumulation)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return spec_of()  # before the ranks are forked, so that they need not import the family's module


@pytest.fixture(scope="module")
def alone(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (result,) = on_ranks(partial(trained, spec, "one", 1), 1, tmp_path_factory.mktemp("alone"))
    return result


@pytest.mark.parametrize(
    ("layout", "ranks", "accumulation"), [("one", 1, 8), ("ddp", 2, 4), ("ddp", 4, 1), ("fsdp", 2, 2), ("hsdp", 4, 2)]
)
def test_any_layout_trains_the_same(
    spec: ModelSpec, alone: dict[str, Any], layout: Layout, ranks: int, accumulation: int, tmp_path: Path
) -> None:
    found = on_ranks(partial(trained, spec, layout, accumulation), ranks, tmp_path)
    for rank in found:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    for name, value in alone["weights"].items():
        np.testing.assert_allclose(found[0]["weights"][name], value, atol=2e-4, err_msg=name)


def test_the_logits_are_those_of_each_tasks_rows(spec: ModelSpec) -> None:
    model = meta_model(spec)
    fill(model, initial_tensors(spec, seed=3), device=torch.device("cpu"))
    model.eval()
    batch = batch_of(range(8))
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        states = model.get_submodule("bert")(batch.inputs["input_ids"], batch.inputs["attention_mask"]).last_hidden_state
        topic = model.get_submodule("heads.topic_head.output")(states[[0, 1, 4, 5], 0])
    torch.testing.assert_close(logits["topic"], topic)
    assert logits["score"].shape == (2, 1) and logits["words"].shape == (2, 16, VOCABULARY)


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_every_encoder_trains_all_its_parameters(kind: str) -> None:
    spec = spec_of(kind)
    model = meta_model(spec)
    fill(model, initial_tensors(spec, seed=3), device=torch.device("cpu"))
    batch = batch_of([2, 6])  # numbers alone: the other heads have no row
    multi_task(model(**batch.inputs), batch, tasks=TASKS).sum.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not model.get_parameter("heads.topic_head.output.weight").grad.any()  # type: ignore[union-attr]
    assert model.get_parameter("heads.score_head.output.weight").grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_body_comes_from_a_masked_model_and_goes_back_to_transformers(kind: str, tmp_path: Path) -> None:
    source = head_spec(kind, "masked_lm")
    config, first = source.hf_config, dict(initial_tensors(source, seed=9))
    (tmp_path / "in").mkdir()
    config.save_pretrained(tmp_path / "in")
    save_file({n: t.contiguous() for n, t in first.items()}, tmp_path / "in/model.safetensors", {"format": "pt"})
    spec = spec_of(kind, type=None, sizes={}, path=str(tmp_path / "in"))
    tensors = dict(initial_tensors(spec, seed=1))
    body = {name for name, _ in meta_model(spec).named_parameters() if name.startswith(f"{kind}.")}
    for name in body:
        assert torch.equal(tensors[name], first[name]), name
    assert torch.isfinite(tensors["heads.topic_head.output.weight"]).all()
    (tmp_path / "out").mkdir()
    spec.hf_config.save_pretrained(tmp_path / "out")
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "out/model.safetensors", {"format": "pt"})
    loaded, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert all("pooler" in key for key in info["missing_keys"])
    for name in body:
        assert torch.equal(loaded.get_parameter(name.removeprefix(f"{kind}.")), tensors[name]), name


def test_dropout_stands_before_the_heads() -> None:
    model: Any = spec_of(dropout=0.3).build()
    assert model.heads["topic_head"].dropout.p == 0.3


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"task.tasks.my-task: a task's name has letters.*; nearest: my_task"):
        spec_of(tasks={"my-task": HeadConfig()}, outputs={"my-task": 2})
    with pytest.raises(ConfigError, match="gpt2 is no encoder"):
        multi_task_spec(head_spec("gpt2", "causal_lm"), tasks={"topic": HeadConfig()}, outputs={"topic": 2})
    # A name that is a method of torch's containers is as good as any.
    assert spec_of(tasks={"items": HeadConfig()}, outputs={"items": 2}).build()


def test_tensor_parallel_keeps_the_answer(tmp_path: Path) -> None:
    """The head for tokens is tied to the embedding, which is cut along the vocabulary."""
    spec = spec_of()
    batches = [batch_of(range(8)), batch_of(range(8, 14))]
    case = Case(spec, enlarged(spec), batches, partial(multi_task, tasks=TASKS))
    wanted = on_ranks(lambda world: reference(case), 1, tmp_path)[0]
    for answer in on_ranks(lambda world: parallel_answer(case, world, tp=2), 2, tmp_path):
        assert_close(answer, wanted, bound=2e-6)
