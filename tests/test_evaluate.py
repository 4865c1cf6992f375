import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distllm.comm import World
from distllm.config.errors import DataError
from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms
from distllm.evaluate import Evaluation, evaluate
from distllm.train.tasks import token_figures
from tests.ranks import on_ranks

CPU = torch.device("cpu")
VOCAB = 16


class Stub:
    """An engine whose logits are a fixed table: the token before decides."""

    def __init__(self, *, counts_correct: bool = True) -> None:
        self.table = torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        self.counts_correct = counts_correct

    def eval_step(self, batch: Batch) -> LossTerms:
        logits, labels = self.table[batch.inputs["input_ids"]], batch.targets["labels"]
        kept = labels != IGNORE
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        parts = {"correct": ((logits.argmax(-1) == labels) & kept).sum()} if self.counts_correct else {}
        return LossTerms(loss, kept.sum(), parts)


def samples(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of 8 tokens with uneven masks."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        tokens = torch.randint(0, VOCAB, (9,), generator=generator)
        labels = tokens[1:].clone()
        labels[: i % 5] = IGNORE
        rows.append((tokens[:-1], labels))
    return rows


def batches(rows: list, *, rank: int, size: int, micro_batch: int, number: int) -> list[Batch]:
    """This rank's rows, padded to `number` batches with rows that have no target."""
    mine = list(enumerate(rows))[rank::size]
    padding = (-1, (torch.zeros(8, dtype=torch.int64), torch.full((8,), IGNORE)))
    mine += [padding] * (number * micro_batch - len(mine))
    made = []
    for start in range(0, len(mine), micro_batch):
        chosen = mine[start : start + micro_batch]
        inputs, labels = (torch.stack([row[1][k] for row in chosen]) for k in (0, 1))
        made.append(Batch({"input_ids": inputs}, {"labels": labels}, tuple(row[0] for row in chosen)))
    return made


def of_all_rows(rows: list) -> Evaluation:
    """The figures from one pass over all rows at once, in fp64, without the function under test."""
    table = Stub().table
    inputs, labels = (torch.stack([row[k] for row in rows]) for k in (0, 1))
    kept = labels != IGNORE
    logs = torch.log_softmax(table[inputs], -1)
    loss = float(-logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept].mean())
    accuracy = float((table[inputs].argmax(-1) == labels)[kept].double().mean())
    return Evaluation(loss, int(kept.sum()), {"perplexity": math.exp(loss), "accuracy": accuracy})


def without_parts(found: Evaluation) -> Evaluation:
    """What can be compared, and sent by a rank."""
    return replace(found, parts={})


def test_the_same_figures_on_1_and_4_ranks_with_an_uneven_end(tmp_path: Path) -> None:
    rows = samples(13)
    expected = of_all_rows(rows)

    def job(world: World) -> Evaluation:
        mine = batches(rows, rank=world.rank, size=world.size, micro_batch=3, number=2 if world.size == 4 else 5)
        group = None if world.size == 1 else torch.distributed.group.WORLD
        return without_parts(evaluate(Stub().eval_step, mine, group=group, device=CPU, figures=token_figures))

    for size in (1, 4):
        for found in on_ranks(job, size, tmp_path):
            assert found.count == expected.count and found.figures["accuracy"] == expected.figures["accuracy"]
            assert found.loss == pytest.approx(expected.loss, rel=1e-12)
            assert found.figures["perplexity"] == pytest.approx(expected.figures["perplexity"], rel=1e-12)


def test_a_rank_without_a_batch_takes_part(tmp_path: Path) -> None:
    rows = samples(3)

    def job(world: World) -> Evaluation:
        mine = batches(rows, rank=0, size=1, micro_batch=3, number=1) if world.rank == 1 else []
        found = evaluate(
            Stub().eval_step, mine, group=torch.distributed.group.WORLD, device=CPU, figures=token_figures
        )
        return without_parts(found)

    made = batches(rows, rank=0, size=1, micro_batch=3, number=1)
    alone = without_parts(evaluate(Stub().eval_step, made, group=None, device=CPU, figures=token_figures))
    assert on_ranks(job, 2, tmp_path) == [alone, alone]


def test_many_batches_lose_no_precision() -> None:
    class Constant:
        def eval_step(self, batch: Batch) -> LossTerms:
            return LossTerms(torch.tensor(1e7), torch.tensor(1e7 - 3))

    batch = batches(samples(1), rank=0, size=1, micro_batch=1, number=1)[0]
    found = evaluate(Constant().eval_step, [batch] * 300, group=None, device=CPU, figures=token_figures)
    assert found.count == 300 * 9_999_997 and found.loss == 1e7 / 9_999_997  # fp32 sums would be off by 1e-5


def test_no_batch_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    for name in ("item", "__float__", "__bool__", "tolist", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, name=name, real=real: reads.append(name) or real(t))

    def given() -> Iterator[Batch]:
        yield from batches(samples(12), rank=0, size=1, micro_batch=3, number=4)
        reads.append("end of the batches")

    evaluate(Stub().eval_step, given(), group=None, device=CPU, figures=token_figures)
    assert reads[0] == "end of the batches" and "cpu" in reads


def test_parts_of_any_shape_are_added_over_ranks_and_batches(tmp_path: Path) -> None:
    def job(world: World) -> list[list[float]]:
        def step(batch: Batch) -> LossTerms:
            number = torch.tensor(float(batch.sample_ids[0] + 1))
            return LossTerms(number, torch.tensor(1), {"table": number * torch.arange(4.0).reshape(2, 2), "one": number})

        made = [Batch({}, {}, (i,)) for i in range(5)][world.rank :: world.size]
        group = None if world.size == 1 else torch.distributed.group.WORLD
        found = evaluate(step, made, figures=lambda totals: {"one": float(totals.parts["one"])}, group=group, device=CPU)
        assert found.figures == {"one": 15.0} and found.loss == 3.0
        return found.parts["table"].tolist()

    for size in (1, 2, 4):
        assert on_ranks(job, size, tmp_path) == [[[0.0, 15.0], [30.0, 45.0]]] * size


def test_metrics_have_their_names_and_unknown_accuracy_is_left_out() -> None:
    made = batches(samples(6), rank=0, size=1, micro_batch=3, number=2)
    metrics = evaluate(Stub().eval_step, made, group=None, device=CPU, figures=token_figures).as_metrics()
    assert set(metrics) == {"val_loss", "val_perplexity", "val_accuracy", "val_tokens"}
    bare = evaluate(Stub(counts_correct=False).eval_step, made, group=None, device=CPU, figures=token_figures)
    assert "val_accuracy" not in bare.as_metrics() and bare.loss == metrics["val_loss"]


def test_figures_that_are_not_finite_or_too_large_are_told_as_they_are() -> None:
    class Fixed(Stub):
        def __init__(self, loss: float) -> None:
            self.loss = loss

        def eval_step(self, batch: Batch) -> LossTerms:
            return LossTerms(torch.tensor(self.loss), torch.tensor(1))

    made = batches(samples(1), rank=0, size=1, micro_batch=1, number=1)
    unknown = evaluate(Fixed(math.nan).eval_step, made, group=None, device=CPU, figures=token_figures)
    large = evaluate(Fixed(5000.0).eval_step, made, group=None, device=CPU, figures=token_figures)
    assert math.isnan(unknown.figures["perplexity"]) and large.figures["perplexity"] == math.inf


def test_no_target_token_is_one_clear_line() -> None:
    for made in ([], batches([], rank=0, size=1, micro_batch=2, number=1)):
        with pytest.raises(DataError, match="no target"):
            evaluate(Stub().eval_step, made, group=None, device=CPU, figures=token_figures)
