"""Any schedule gives the losses and gradients that one process gives with the same micro-batches."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.comm import World
from distllm.data.batch import IGNORE, Batch
from distllm.generate import Sampling, stream
from distllm.parallel.cut import Foreign
from distllm.parallel.equal_shapes import equal_shapes
from distllm.parallel.pipeline import PipelinedModel
from tests.parallel.pipelines import EVERY, Case, gradients, one_process, piped, step_of, terms, worst
from tests.parallel.test_parallelize import Recorder
from tests.ranks import on_ranks

FAMILIES = ("llama", "qwen3", "gpt2", "gpt_neox", "mixtral", "gemma2", "bert")


def check(case: Case, schedules: tuple[str, ...], folder: Path, *, tolerance: float) -> None:
    """Loss and every gradient of a step, the terms of an evaluation in another shape, and a step after it in a third."""
    model = one_process(case)
    others = replace(case, microbatches=case.microbatches + (0 if case.csv else 2 * case.pp)).batches(rows=1, length=6)
    total = step_of(model, case.batches())
    wanted = gradients(model)
    other_total = step_of(model, others[: len(others) // (case.replicate * case.shard)]) if case.pp == 2 else None
    single = case.batches(rows=3, length=5)[0]
    model.eval()
    with torch.no_grad():
        outputs = model(**single.inputs)
        loss = terms(outputs, single)
        logits = getattr(outputs, "logits", outputs).numpy()

    def rank(world: World) -> list[Any]:
        answers: list[Any] = []
        for schedule in schedules:
            pipeline, cut, batches = piped(world, case, schedule)
            first = pipeline.train(batches, terms).numpy()
            grads = gradients(cut.model)
            cut.model.eval()
            found, count, parts = pipeline.evaluate(single, terms)
            text = pipeline.logits(single.inputs).numpy()
            cut.model.train()
            second = pipeline.train(others[: len(others) // (case.replicate * case.shard)], terms).numpy()
            third = pipeline.train(batches, terms, scale=0.5).numpy()
            evaluated = float(found), float(count), float(parts["correct"]), parts["table"].numpy()
            answers.append((first, grads, evaluated, text, second, third))
            cut.model.zero_grad()
        return answers

    answers = on_ranks(rank, case.pp * case.replicate * case.shard, folder)
    for number, schedule in enumerate(schedules):
        here = [answer[number] for answer in answers]
        summed = sum(answer[0] for answer in here) / case.pp  # ranks of a pipeline have the same, data-parallel ones parts
        np.testing.assert_allclose(summed, total, rtol=tolerance, err_msg=schedule)
        error, name = worst([answer[1] for answer in here], wanted)
        assert error < tolerance, (schedule, name, error)
        for first, _, evaluated, text, second, third in here:
            whole = (float(loss.sum), float(loss.count), float(loss.parts["correct"]))
            np.testing.assert_allclose(evaluated[:3], whole, rtol=tolerance)
            np.testing.assert_array_equal(evaluated[3], loss.parts["table"].numpy())
            np.testing.assert_allclose(text, logits, rtol=0, atol=tolerance * np.abs(logits).max())
            np.testing.assert_array_equal(first, third)
            if other_total is not None:
                np.testing.assert_allclose(second, other_total, rtol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_schedule_gives_the_gradients_of_one_process(family: str, tmp_path: Path) -> None:
    check(Case(family), EVERY, tmp_path, tolerance=1e-12)


def test_a_module_of_the_users_own_is_cut_by_its_spec(tmp_path: Path) -> None:
    check(Case("toy"), ("gpipe", "1f1b"), tmp_path, tolerance=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_four_ranks(family: str, tmp_path: Path) -> None:
    check(Case(family, blocks=8, microbatches=8, pp=4), EVERY, tmp_path, tolerance=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_fp32(family: str, tmp_path: Path) -> None:
    check(Case(family, double=False), ("1f1b", "zbv"), tmp_path, tolerance=2e-6)


def test_one_and_three_stages_a_rank(tmp_path: Path) -> None:
    looped = ("interleaved_1f1b", "interleaved_zero_bubble")
    check(Case("gpt2", virtual=1), looped, tmp_path / "one", tolerance=1e-12)
    check(Case("gpt2", blocks=6, virtual=3), looped, tmp_path / "three", tolerance=1e-12)


def test_a_split_of_the_users_own(tmp_path: Path) -> None:
    check(Case("llama", split=[1, 3]), ("1f1b",), tmp_path, tolerance=1e-12)
    check(Case("gpt2", blocks=6, split=[1, 2, 2, 1]), ("zbv",), tmp_path / "zbv", tolerance=1e-12)


def test_documents_stay_apart_on_every_stage(tmp_path: Path) -> None:
    check(Case("llama", packed=True), ("1f1b", "dualpipev"), tmp_path, tolerance=1e-12)


@pytest.mark.parametrize(("replicate", "shard"), [(1, 2), (2, 1)])
def test_fsdp_under_a_pipeline(replicate: int, shard: int, tmp_path: Path) -> None:
    """Sums once, after the last micro-batch; also under schedules with which torch's FSDP goes wrong if it reshards."""
    schedules = EVERY if shard == 2 else ("1f1b",)
    check(Case("gpt2", replicate=replicate, shard=shard), schedules, tmp_path, tolerance=1e-12)


def test_a_schedule_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "schedule.csv"  # 1F1B, but the first rank computes its weights' halves late
    file.write_text("0F0,0F1,0I0,0F2,0I1,0W0,0F3,0I2,0W1,0I3,0W2,0W3\n,1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3\n")
    check(Case("gpt2", csv=str(file)), ("csv",), tmp_path / "ranks", tolerance=1e-12)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_tied_weights_stay_tied(schedule: str, tmp_path: Path) -> None:
    """After ten updates both copies are equal to the bit, and those of one process to rounding."""
    case, name = Case("gpt2"), "transformer.wte.weight"
    model = one_process(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(10):
        step_of(model, case.batches())
        optimizer.step()
        optimizer.zero_grad()

    def rank(world: World) -> list[np.ndarray]:
        pipeline, cut, batches = piped(world, case, schedule)
        optimizer = torch.optim.SGD(cut.model.parameters(), lr=1e-2, momentum=0.9)
        for _ in range(10):
            pipeline.train(batches, terms)
            optimizer.step()
            optimizer.zero_grad()
        pipeline.logits(batches[0].inputs)
        ends = [stage for stage in cut.stages if stage.index in (0, len(cut.owners) - 1)]
        return [stage.module.get_parameter(name).detach().numpy().copy() for stage in ends]

    first, last = (copy for copies in on_ranks(rank, 2, tmp_path) for copy in copies)
    np.testing.assert_array_equal(first, last)
    np.testing.assert_allclose(first, model.get_parameter(name).detach().numpy(), rtol=1e-9, atol=1e-12)


def test_a_tied_parameter_counts_once_in_the_norm(tmp_path: Path) -> None:
    case = Case("gpt2")
    model = one_process(case)
    step_of(model, case.batches())
    wanted = sum(float(grad.square().sum()) for grad in (p.grad for p in model.parameters()) if grad is not None)

    def rank(world: World) -> float:
        pipeline, cut, batches = piped(world, case, "1f1b")
        pipeline.train(batches, terms)
        counted = (p.grad for n, p in cut.model.named_parameters() if cut.counts_in_norm(n))
        return sum(float(grad.square().sum()) for grad in counted if grad is not None)

    assert sum(on_ranks(rank, 2, tmp_path)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv"])
def test_stages_start_from_the_numbers_of_one_process(schedule: str, tmp_path: Path) -> None:
    case = Case("llama", double=False)
    wanted = {name: tensor.numpy() for name, tensor in case.tensors().items()}

    def rank(world: World) -> dict[str, np.ndarray]:
        _, cut, _ = piped(world, case, schedule)
        assert set(cut.model.state_dict()) == {n for n, _ in cut.model.named_parameters()}
        return {name: p.detach().numpy().copy() for name, p in cut.model.named_parameters()}

    ranks = on_ranks(rank, 2, tmp_path)
    assert not ranks[0].keys() & ranks[1].keys()
    found = ranks[0] | ranks[1]
    assert found.keys() == {name for name in wanted if "inv_freq" not in name}
    for name, value in found.items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    queries = [value for name, value in found.items() if name.endswith("q_proj.weight")]
    assert len(queries) == 4 and all(not np.array_equal(a, b) for i, a in enumerate(queries) for b in queries[:i])


class Messages(TorchDispatchMode):
    """Counts point-to-point messages and their elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d" and "send" in str(op):
            self.sent.append(sum(t.numel() for t in args[0]))
        elif op.namespace == "c10d" and "recv" not in str(op) and "barrier" not in str(op):
            self.others.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("schedule", "boundaries"), [("1f1b", 1), ("interleaved_1f1b", 3), ("zbv", 2)])
def test_a_boundary_costs_one_message_each_way_a_microbatch(schedule: str, boundaries: int, tmp_path: Path) -> None:
    """2·B·S·D elements per boundary between ranks and micro-batch, and [loss sum, count] once."""
    case = Case("llama")

    def rank(world: World) -> tuple[list[int], list[str]]:
        pipeline, _, batches = piped(world, case, schedule)
        pipeline.train(batches, terms)
        with Messages() as messages:
            pipeline.train(batches, terms)
        return messages.sent, messages.others

    answers = on_ranks(rank, 2, tmp_path)
    sent = [size for sizes, _ in answers for size in sizes]
    assert sent == [2 * 8 * 32] * (2 * boundaries * case.microbatches)
    assert [len(others) for _, others in answers] == [1, 1]


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_fsdp_scatters_gradients_once_a_step(schedule: str, tmp_path: Path) -> None:
    """A rank's 2 blocks, and what is outside of blocks on an end of the pipeline, however many micro-batches there are."""
    case = Case("llama", shard=2, split=[2, 2] if schedule == "1f1b" else [1, 1, 1, 1])

    def rank(world: World) -> tuple[int, int, int]:
        pipeline, cut, batches = piped(world, case, schedule, reshard=False)
        pipeline.train(batches, terms)
        cut.model.zero_grad()
        with Recorder() as recorder:
            pipeline.train(batches, terms)
        ends = sum(stage.index in (0, len(cut.owners) - 1) for stage in cut.stages)
        return recorder.calls["reduce_scatter"], recorder.calls["all_gather"], ends

    answers = on_ranks(rank, 4, tmp_path)
    assert [ends for *_, ends in answers] == ([1, 1, 1, 1] if schedule == "1f1b" else [2, 2, 0, 0])
    for scattered, gathered, ends in answers:
        assert scattered == gathered == 2 + ends


def test_microbatches_of_different_shapes_are_padded_without_weight(tmp_path: Path) -> None:
    case = Case("llama", microbatches=2)
    batches = [*case.batches(), *case.batches(rows=1, length=5)]
    packed = Case("llama", microbatches=2, packed=True)
    masked = [*packed.batches(), *packed.batches(rows=1, length=5)]
    for given in (batches, masked):
        equal = equal_shapes(given, pad_id=0)
        assert {batch.inputs["input_ids"].shape for batch in equal} == {(2, 8)}
        assert equal[-1].sample_ids == (0, -1)
        mask = equal[-1].inputs.get("attention_mask")
        assert mask is None or bool(mask.any(-1).all()), "some kernels make a softmax over nothing not a number"
        model = one_process(case)
        total = step_of(model, given)
        wanted = gradients(model)
        np.testing.assert_allclose(step_of(model, equal), total, rtol=1e-12)
        assert worst([gradients(model)], wanted)[0] < 1e-12

    def rank(world: World) -> np.ndarray:
        pipeline, _, _ = piped(world, case, "1f1b")
        return pipeline.train(batches, terms).numpy()

    np.testing.assert_allclose(on_ranks(rank, 2, tmp_path)[0], step_of(one_process(case), batches), rtol=1e-12)


def test_labels_of_rows_are_padded_by_row() -> None:
    batch = Batch({"input_ids": torch.ones(1, 3, dtype=torch.int64)}, {"labels": torch.tensor([2])}, (0,))
    larger = Batch({"input_ids": torch.ones(2, 4, dtype=torch.int64)}, {"labels": torch.tensor([1, 0])}, (1, 2))
    first, second = equal_shapes([batch, larger], pad_id=7)
    assert first.targets["labels"].tolist() == [2, IGNORE] and second is larger
    assert first.inputs["input_ids"].tolist() == [[1, 1, 1, 7], [1, 1, 1, 7]]


def test_a_foreign_block_keeps_what_a_loop_reads(tmp_path: Path) -> None:
    def rank(world: World) -> list[bool]:
        _, cut, _ = piped(world, Case("llama"), "1f1b")
        return [isinstance(block, Foreign) for block in cut.model.get_submodule("model.layers").children()]

    first, second = on_ranks(rank, 2, tmp_path)
    assert first == [not flag for flag in second] and len(first) == 4


def test_text_is_written_by_all_stages_together(tmp_path: Path) -> None:
    case, sampling = Case("llama", double=False), Sampling(6, temperature=0.0)
    prompt = torch.arange(8).reshape(2, 4)
    wanted = torch.stack(list(stream(one_process(case), input_ids=prompt, sampling=sampling))).tolist()

    def rank(world: World) -> list[list[int]]:
        pipeline, _, _ = piped(world, case, "interleaved_1f1b")
        return torch.stack(list(stream(PipelinedModel(pipeline), input_ids=prompt, sampling=sampling))).tolist()

    assert on_ranks(rank, 2, tmp_path) == [wanted, wanted]


def test_autocast_stands_around_forward_passes_alone(tmp_path: Path) -> None:
    """bf16 products, fp32 between stages: to the bit what one process computes."""
    case = Case("llama", double=False)
    low = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    model = one_process(case)
    for batch in case.batches():
        with low():
            outputs = model(**batch.inputs)
        terms(outputs, batch).sum.backward()
    wanted = gradients(model)

    def rank(world: World) -> dict[str, np.ndarray]:
        pipeline, cut, batches = piped(world, case, "1f1b")
        for stage in pipeline.stages:
            stage.slot.context = lambda batch: low()
        pipeline.train(batches, terms)
        return gradients(cut.model)

    assert worst(on_ranks(rank, 2, tmp_path), wanted)[0] == 0.0


def test_bf16_of_fsdp_travels_between_stages(tmp_path: Path) -> None:
    """Parameters gathered in bf16, gradients reduced in fp32: within the format's precision of one process in fp32."""
    case = Case("llama", double=False, shard=2, low=True)
    model = one_process(case)
    total = step_of(model, case.batches())
    wanted = gradients(model)

    def rank(world: World) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        pipeline, cut, batches = piped(world, case, "zbv")
        return pipeline.train(batches, terms).numpy(), gradients(cut.model)

    answers = on_ranks(rank, 4, tmp_path)
    np.testing.assert_allclose(sum(loss for loss, _ in answers) / 2, total, rtol=1e-3)
    assert worst([grads for _, grads in answers], wanted)[0] < 3e-2


def test_frozen_blocks_get_no_gradient(tmp_path: Path) -> None:
    """With the embedding and the first stage's blocks frozen, what it sends needs no gradient."""
    case = Case("llama")
    model = one_process(case)
    frozen = ("model.embed_tokens", "model.layers.0.", "model.layers.1.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    step_of(model, case.batches())
    wanted = gradients(model)

    def rank(world: World) -> dict[str, np.ndarray]:
        pipeline, cut, batches = piped(world, replace(case, split=[2, 2]), "1f1b")
        for name, parameter in cut.model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        pipeline.train(batches, terms)
        return gradients(cut.model)

    assert worst(on_ranks(rank, 2, tmp_path), wanted)[0] < 1e-12
