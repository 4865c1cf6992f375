"""Objectives against torch's own losses, and their sums in any split."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.config.schema import HeadConfig
from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms
from distllm.train.objectives import causal_lm, classification, masked_lm, multi_task, regression

ROWS, LENGTH, WIDTH = 6, 5, 7


def made(seed: int = 0, *, share: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] and labels [B, S] of which about `share` are there; row 0 has none."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, LENGTH, WIDTH, generator=random)
    labels = torch.randint(0, WIDTH, (ROWS, LENGTH), generator=random)
    labels[torch.rand(ROWS, LENGTH, generator=random) > share] = IGNORE
    labels[0] = IGNORE
    return logits, labels


def batch_of(**targets: torch.Tensor) -> Batch:
    return Batch({}, targets, ())


@pytest.mark.parametrize("objective", [causal_lm, masked_lm])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tokens_equal_torchs_cross_entropy(objective: Callable[..., LossTerms], smoothing: float) -> None:
    logits, labels = made()
    logits.requires_grad_()
    terms = objective(logits, batch_of(labels=labels), label_smoothing=smoothing)
    mean = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(terms.sum / terms.count, mean)
    assert int(terms.count) == int((labels != IGNORE).sum())
    assert not terms.parts
    own, theirs = torch.autograd.grad(terms.sum / terms.count, logits), torch.autograd.grad(mean, logits)
    torch.testing.assert_close(own, theirs)


def test_the_loss_and_its_gradient_are_as_exact_as_torchs() -> None:
    """Against fp64, with logits as large as a trained model's, all of them shifted far from 0."""
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, 4096, generator=random) + 30
    labels = torch.randint(0, 4096, (64,), generator=random)

    def errors(loss: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
        exact, rounded = logits.double().requires_grad_(), logits.clone().requires_grad_()
        (wanted,), (found,) = (torch.autograd.grad(loss(x), x) for x in (exact, rounded))
        return float((loss(rounded) - loss(exact)).detach().abs()), float((found - wanted).norm() / wanted.norm())

    own = errors(lambda x: causal_lm(x, batch_of(labels=labels)).sum)
    torchs = errors(lambda x: F.cross_entropy(x, labels, reduction="sum"))
    assert own[0] < 64 * 2e-6 and own[1] < max(1.2 * torchs[1], 2e-7)


def test_a_step_keeps_one_buffer_of_the_size_of_the_logits_where_torch_keeps_three() -> None:
    """Bytes of large tensors alive at once, from the logits to their gradient."""
    logits = torch.randn(512, 2048, requires_grad=True)
    labels = torch.randint(0, 2048, (512,))
    own = _most_alive(lambda: causal_lm(logits, batch_of(labels=labels)).sum.backward(), least=logits.nbytes)
    logits.grad = None
    torchs = _most_alive(lambda: F.cross_entropy(logits, labels, reduction="sum").backward(), least=logits.nbytes)
    assert own == logits.nbytes and torchs == 3 * logits.nbytes


def _most_alive(work: Callable[[], None], *, least: int) -> int:
    """The most bytes at once of the tensors of at least `least` bytes that operators make meanwhile."""

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.alive: dict[int, int] = {}
            self.most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
            for one in made if isinstance(made, tuple | list) else (made,):
                storage = one.untyped_storage() if isinstance(one, torch.Tensor) else None
                if storage is not None and storage.nbytes() >= least and storage.data_ptr() not in given:
                    self.alive[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage.data_ptr(), None)
            self.most = max(self.most, sum(self.alive.values()))
            return made

    with Watch() as watch:
        work()
    return watch.most


@pytest.mark.parametrize("objective", [causal_lm, masked_lm])
def test_validation_is_not_smoothed_and_counts_correct_tokens(objective: Callable[..., LossTerms]) -> None:
    logits, labels = made()
    with torch.no_grad():
        terms = objective(SimpleNamespace(logits=logits), batch_of(labels=labels), label_smoothing=0.1)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(terms.sum, expected)
    assert int(terms.parts["correct"]) == int((logits.argmax(-1) == labels).sum()) > 0


def test_the_loss_of_half_precision_logits_is_computed_in_fp32() -> None:
    logits, labels = made()
    low = logits.bfloat16()
    for objective in (causal_lm, masked_lm):
        terms = objective(low, batch_of(labels=labels))
        assert terms.sum.dtype == torch.float32
        torch.testing.assert_close(terms.sum, objective(low.float(), batch_of(labels=labels)).sum, rtol=0, atol=0)


@pytest.mark.parametrize("objective", [causal_lm, masked_lm])
def test_without_a_label_sum_and_gradient_are_zero(objective: Callable[..., LossTerms]) -> None:
    logits = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    terms = objective(logits, batch_of(labels=torch.full((2, LENGTH), IGNORE)))
    terms.sum.backward()
    assert terms.sum.item() == terms.count.item() == 0
    assert logits.grad is not None and not logits.grad.any()


def test_classification_and_its_confusion() -> None:
    logits, labels = made()[0][:, 0, :3].clone(), torch.tensor([2, IGNORE, 0, 2, 1, IGNORE])
    logits[0, 0] = 9.0  # a sample of class 2 is taken for class 0, and none of class 0 for class 2
    logits[2, 0] = 9.0
    with torch.no_grad():
        terms = classification(logits, batch_of(labels=labels), label_smoothing=0.2)
    torch.testing.assert_close(terms.sum, F.cross_entropy(logits, labels, reduction="sum"))
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for true, predicted in zip(labels.tolist(), logits.argmax(-1).tolist(), strict=True):
        if true != IGNORE:
            expected[true, predicted] += 1
    assert torch.equal(terms.parts["confusion"], expected)
    assert int(terms.count) == int(expected.sum()) == 4
    assert int(terms.parts["correct"]) == int(expected.trace())
    smooth = classification(logits, batch_of(labels=labels), label_smoothing=0.2)
    torch.testing.assert_close(smooth.sum, F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.2))


def test_regression_weighs_its_rows() -> None:
    predicted, labels = torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([0.5, 4.0, 0.0])
    weight = torch.tensor([1.0, 1.0, 0.0])
    with torch.no_grad():
        terms = regression(predicted, batch_of(labels=labels, weight=weight))
    assert terms.sum.item() == pytest.approx(0.25 + 4.0) and float(terms.count) == 2.0
    expected = {"n": 2, "x": 3, "y": 4.5, "xx": 5, "yy": 16.25, "xy": 8.5, "absolute": 2.5, "squared": 4.25}
    assert {name: float(part) for name, part in terms.parts.items()} == pytest.approx(expected)


TASKS = {
    "topic": HeadConfig(kind="classification", weight=2.0),
    "score": HeadConfig(kind="regression", weight=0.5),
    "words": HeadConfig(kind="masked_lm"),
}


def multi_outputs(rows: dict[str, list[int]]) -> tuple[Any, Batch]:
    """Outputs and targets for the given rows, out of one fixed pool, of each task."""
    logits, labels = made()
    random = torch.Generator().manual_seed(3)
    topic, score = torch.randn(ROWS, 3, generator=random), torch.randn(ROWS, 1, generator=random)
    targets = {
        "labels_topic": torch.tensor([0, 1, 2, IGNORE, 1, 1])[rows["topic"]],
        "labels_score": torch.randn(ROWS, generator=random)[rows["score"]],
        "weight_score": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])[rows["score"]],
        "labels_words": labels[rows["words"]],
    }
    outputs = {"topic": topic[rows["topic"]], "score": score[rows["score"]], "words": logits[rows["words"]]}
    return SimpleNamespace(logits=outputs), batch_of(**targets)


EVERY: dict[str, list[int]] = {name: list(range(ROWS)) for name in TASKS}


def test_multi_task_is_the_weighted_sum_over_samples() -> None:
    outputs, batch = multi_outputs(EVERY)
    with torch.no_grad():
        terms = multi_task(outputs, batch, tasks=TASKS)
    topic = F.cross_entropy(outputs.logits["topic"], batch.targets["labels_topic"], reduction="sum")
    score = (outputs.logits["score"].squeeze(1) - batch.targets["labels_score"]).square()[[0, 1, 2, 3, 5]].sum()
    words = torch.zeros(())
    for row, labels in zip(outputs.logits["words"], batch.targets["labels_words"], strict=True):
        if (labels != IGNORE).any():
            words = words + F.cross_entropy(row, labels)
    torch.testing.assert_close(terms.sum, 2.0 * topic + 0.5 * score + words)
    samples = int((batch.targets["labels_words"] != IGNORE).any(1).sum())
    assert float(terms.count) == 5 + 5 + samples
    torch.testing.assert_close(terms.parts["words.sum"], words)
    assert float(terms.parts["words.count"]) == samples and float(terms.parts["score.n"]) == 5
    assert int(terms.parts["topic.confusion"].sum()) == 5
    assert int(terms.parts["words.tokens"]) == int((batch.targets["labels_words"] != IGNORE).sum())


def test_multi_task_adds_up_over_any_split_with_tasks_that_are_absent() -> None:
    splits: list[dict[str, list[int]]] = [
        {"topic": [0, 1, 2], "score": [], "words": [0, 1]},
        {"topic": [], "score": [0, 1, 2, 3, 4, 5], "words": []},
        {"topic": [3, 4, 5], "score": [], "words": [2, 3, 4, 5]},
    ]
    with torch.no_grad():
        whole = multi_task(*multi_outputs(EVERY), tasks=TASKS)
        pieces = [multi_task(*multi_outputs(rows), tasks=TASKS) for rows in splits]
    torch.testing.assert_close(sum(p.sum for p in pieces), whole.sum)
    assert sum(float(p.count) for p in pieces) == float(whole.count)
    for name, part in whole.parts.items():
        added = torch.stack([p.parts[name] for p in pieces]).sum(0)
        torch.testing.assert_close(added.double(), part.double(), msg=name)


def test_an_absent_task_has_a_zero_gradient() -> None:
    outputs, batch = multi_outputs({"topic": [0], "score": [], "words": []})
    for logits in outputs.logits.values():
        logits.requires_grad_()
    multi_task(outputs, batch, tasks=TASKS).sum.backward()
    assert all(logits.grad is not None for logits in outputs.logits.values())


def test_fp64_stays_fp64() -> None:
    """A proof in fp64 is none where the loss has seven digits."""
    logits, labels = (t[1:] for t in made())
    wide, classes, number = logits.double(), torch.arange(ROWS - 1), torch.ones(ROWS - 1)
    heads = {"c": HeadConfig(kind="classification"), "m": HeadConfig(kind="masked_lm"), "n": HeadConfig(kind="regression")}
    several = batch_of(labels_c=classes, labels_m=labels, labels_n=number, weight_n=number)
    outputs = SimpleNamespace(logits={"c": wide[:, 0], "m": wide, "n": wide[:, 0, :1]})
    for terms in (
        causal_lm(wide, batch_of(labels=labels)),
        classification(wide[:, 0], batch_of(labels=classes)),
        regression(wide[:, 0, :1], batch_of(labels=number, weight=number)),
        multi_task(outputs, several, tasks=heads),
    ):
        assert terms.sum.dtype == torch.float64
