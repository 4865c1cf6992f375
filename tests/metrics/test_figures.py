"""Every figure by name; the same on one rank and on four, whatever the batches."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distllm.comm import World
from distllm.config.metrics_table import BY_KIND, known_metrics
from distllm.config.schema import HeadConfig
from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms
from distllm.metrics.confusion_png import draw_confusion
from distllm.metrics.figures import metrics_for
from distllm.train.objectives import multi_task
from tests.ranks import on_ranks

KINDS = {"topic": "classification", "score": "regression", "words": "masked_lm"}
TASKS = {name: HeadConfig.model_validate({"kind": kind}) for name, kind in KINDS.items()}
SAMPLES, BATCH = 11, 3


def terms_of(ids: list[int]) -> LossTerms:
    """The terms of these samples under all three tasks; -1 is a row of padding."""
    random = torch.Generator().manual_seed(0)
    made = {
        "topic": torch.randn(SAMPLES, 4, generator=random), "score": torch.randn(SAMPLES, 1, generator=random),
        "words": torch.randn(SAMPLES, 5, 6, generator=random),
    }  # fmt: skip
    topic = torch.randint(0, 3, (SAMPLES,), generator=random)
    score = torch.randn(SAMPLES, generator=random)
    words = torch.randint(0, 6, (SAMPLES, 5), generator=random)
    words[:, ::2] = IGNORE
    there = torch.tensor(ids) >= 0
    targets = {
        "labels_topic": torch.where(there, topic[ids], IGNORE), "labels_score": score[ids], "weight_score": there.float(),
        "labels_words": torch.where(there[:, None], words[ids], IGNORE),
    }  # fmt: skip
    outputs = SimpleNamespace(logits={name: logits[ids] for name, logits in made.items()})
    with torch.no_grad():
        return multi_task(outputs, Batch({}, targets, ()), tasks=TASKS)


def figures_on(world: World) -> dict[str, float]:
    """The figures of all samples, each rank with its slice of every step; the last step has rows of padding."""
    sums: dict[str, torch.Tensor] = {}
    step = BATCH * world.size
    for start in range(0, SAMPLES, step):
        ids = [i if i < SAMPLES else -1 for i in range(start + world.rank * BATCH, start + (world.rank + 1) * BATCH)]
        terms = terms_of(ids)
        for name, part in {"": terms.sum, "#": terms.count, **terms.parts}.items():
            sums[name] = sums.get(name, torch.zeros(part.shape, dtype=torch.float64)) + part.double()
    for name in sorted(sums):
        if world.size > 1:
            torch.distributed.all_reduce(sums[name])
    total, count = float(sums.pop("")), float(sums.pop("#"))
    return metrics_for("multi_task", total=total, count=count, parts=sums, tasks=KINDS)


def test_every_figure_is_the_same_on_one_rank_and_on_four(tmp_path: Path) -> None:
    (one,) = on_ranks(figures_on, 1, tmp_path)
    four = on_ranks(figures_on, 4, tmp_path)
    assert set(one) == set(known_metrics("multi_task", tasks=KINDS)) - {"loss"}
    for found in four:
        for name, value in one.items():
            counted = (name.startswith("topic.") and not name.endswith("loss")) or "accuracy" in name
            assert found[name] == pytest.approx(value, rel=0 if counted else 1e-6), name


def parts_of(kind: str) -> dict[str, Any]:
    if kind == "classification":
        return {"correct": torch.tensor(2.0), "confusion": torch.eye(2, dtype=torch.float64)}
    if kind == "regression":
        return {name: torch.tensor(1.0) for name in ("n", "x", "y", "xx", "yy", "xy", "absolute", "squared")}
    return {"correct": torch.tensor(1.0)}


@pytest.mark.parametrize("kind", list(BY_KIND))
def test_the_table_names_what_there_is(kind: str) -> None:
    found = metrics_for(kind, total=2.0, count=2.0, parts=parts_of(kind))
    assert ("loss", *found) == known_metrics(kind)


def test_bleu_is_known_only_where_asked_for_and_written() -> None:
    assert "bleu" in known_metrics("seq2seq", asked=["bleu"])
    assert "bleu" not in known_metrics("seq2seq") and "bleu" not in known_metrics("causal_lm", asked=["bleu"])


def test_a_perplexity_is_over_tokens_and_its_tasks_loss_over_samples() -> None:
    sums = {"sum": 3.0, "count": 2.0, "nats": 10.0, "tokens": 5.0, "correct": 4.0}
    parts = {f"words.{name}": torch.tensor(value) for name, value in sums.items()}
    found = metrics_for("multi_task", total=3.0, count=2.0, parts=parts, tasks={"words": "masked_lm"})
    assert found["words.loss"] == 1.5 and found["words.accuracy"] == 0.8
    assert found["words.perplexity"] == pytest.approx(math.exp(2.0))


def test_a_task_without_a_sample_has_no_figures() -> None:
    parts = {"topic.sum": torch.tensor(0.0), "topic.count": torch.tensor(0.0), "topic.confusion": torch.zeros(2, 2)}
    assert metrics_for("multi_task", total=0.0, count=1.0, parts=parts, tasks={"topic": "classification"}) == {
        "topic.samples": 0.0
    }


@pytest.mark.parametrize("classes", [2, 31])
def test_the_confusion_matrix_as_a_picture(classes: int, tmp_path: Path) -> None:
    labels = [r"cheap: $\now$", "a very long label that nobody reads", *map(str, range(2, classes))]
    draw_confusion(np.diag(np.arange(classes)), labels, tmp_path / "c.png", title=r"costs $\much$")
    assert (tmp_path / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
