"""The classics, examples of own modules: padding changes nothing, the first numbers are a function of seed and name, they
learn, and every layout computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distllm.comm import World
from distllm.config.schema import OptimConfig, PrecisionConfig, ScheduleConfig
from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms
from distllm.engine.native import DTYPES, NativeEngine
from distllm.models import bag_of_words, gru_seq2seq, lstm, word_vector
from distllm.models.bidirectional import turned
from distllm.models.build import initial_tensors, meta_model
from distllm.models.spec import ModelSpec
from distllm.parallel.mesh import AXES, build_mesh
from distllm.parallel.parallelize import Layout, parallelize
from distllm.train.optim import make_optimizer
from distllm.train.schedule import make_schedule
from tests.models.families import filled
from tests.ranks import on_ranks

VOCAB, START = 40, 2
CLASSIFIERS: dict[str, ModelSpec] = {
    "word_vector": word_vector.spec(vocab_size=VOCAB, labels=3, embedding=6, hidden=5, layers=2, dropout=0.0),
    "bag_of_words": bag_of_words.spec(vocab_size=VOCAB, labels=3, hidden=6, layers=2, dropout=0.0),
    "lstm": lstm.spec(vocab_size=VOCAB, labels=3, embedding=6, hidden=5, layers=2, dropout=0.0),
}
GRU = gru_seq2seq.spec(vocab_size=VOCAB, start_id=START, embedding=6, hidden=5, encoder_layers=2, decoder_layers=2, dropout=0.0)
ALL = CLASSIFIERS | {"gru_seq2seq": GRU}


def texts(lengths: list[int], *, seed: int = 0, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and mask, padded on the right with ids that must not matter."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.stack([torch.randint(4, VOCAB, (mask.shape[1],), generator=generator) for _ in lengths])
    return ids, mask.long()


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_padding_changes_no_classifiers_answer(name: str) -> None:
    model, (ids, mask) = filled(CLASSIFIERS[name]), texts([7, 3, 1, 5], width=8)
    together = model(ids, mask)
    assert together.shape == (4, 3) and together.std(0).min() > 0
    for row, length in enumerate([7, 3, 1, 5]):
        torch.testing.assert_close(model(ids[row : row + 1, :length])[0], together[row])


def test_turning_a_row_around_twice_gives_it_back() -> None:
    turn = turned(torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    assert turn.tolist() == [[2, 1, 0, 4, 3], [4, 3, 2, 1, 0]]


@torch.no_grad()
def test_the_classifiers_lstm_is_torchs_bidirectional_one() -> None:
    model, (ids, _) = filled(lstm.spec(vocab_size=VOCAB, labels=3, embedding=6, hidden=5, dropout=0.0)), texts([4])
    layer: Any = model.get_submodule("layers.0")
    twin = torch.nn.LSTM(6, 5, batch_first=True, bidirectional=True)
    for key in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        getattr(twin, key).copy_(getattr(layer.ahead, key))
        getattr(twin, f"{key}_reverse").copy_(getattr(layer.back, key))
    x = model.get_submodule("embed")(ids)
    torch.testing.assert_close(layer(x, turned(torch.ones_like(ids))), twin(x)[0])


@torch.no_grad()
def test_padding_changes_no_translation() -> None:
    model = filled(GRU)
    (ids, mask), (target, _) = texts([7, 3, 1], width=8), texts([6, 2, 4], seed=1)
    together = model(ids, mask, target)
    assert together.shape == (3, 6, VOCAB)
    for row, (source, length) in enumerate([(7, 6), (3, 2), (1, 4)]):
        alone = model(ids[row : row + 1, :source], None, target[row : row + 1, :length])[0]
        torch.testing.assert_close(alone, together[row, :length])


@torch.no_grad()
def test_decoding_a_token_at_a_time_is_teacher_forcing() -> None:
    model: Any = filled(GRU)
    (ids, mask), (target, _) = texts([7, 3], width=8), texts([5, 5], seed=1)
    memory = model.encode(ids, mask)
    state = model.first_state(memory)
    assert all(t.shape[0] == 2 for t in (*memory, *state))
    for at in range(5):
        logits, state = model.decode_step(memory, state, target[:, at])
        torch.testing.assert_close(logits, model(ids, mask, target)[:, at])


@pytest.mark.parametrize("name", ALL)
def test_the_first_numbers_are_a_function_of_seed_and_name(name: str) -> None:
    spec = ALL[name]
    first, again, other = (dict(initial_tensors(spec, seed=seed)) for seed in (1, 1, 2))
    names = {n for n, _ in meta_model(spec).named_parameters()}
    assert set(first) == names and all(torch.equal(first[n], again[n]) for n in names)
    assert not torch.equal(first[spec.embedding + ".weight"], other[spec.embedding + ".weight"])  # type: ignore[operator]
    block = [n for n in names if n.startswith(f"{spec.blocks[0]}.0.")]
    assert all(torch.equal(t, first[n]) for n, t in initial_tensors(spec, seed=1, names=block))


def test_forget_gates_begin_open() -> None:
    first = dict(initial_tensors(CLASSIFIERS["lstm"], seed=1))
    both = first["layers.0.back.bias_ih_l0"] + first["layers.0.back.bias_hh_l0"]
    assert both[5:10].tolist() == [1.0] * 5 and both[:5].abs().max() < 1.0


def task_of(name: str, rows: range) -> Batch:
    """Texts whose tokens say their class, or whose translation repeats what their first token says."""
    ids, mask = (torch.cat(t) for t in zip(*(texts([3 + row % 5], seed=row, width=8) for row in rows), strict=True))
    if name != "gru_seq2seq":
        labels = ids[:, 0] % 3
        return Batch({"input_ids": 4 + labels[:, None] + 3 * (ids % 11), "attention_mask": mask}, {"labels": labels}, tuple(rows))
    ids = 4 + ids % 3
    target = torch.where(mask == 1, ids[:, :1] + 20, IGNORE)
    start = torch.full((len(rows), 1), START)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.cat([start, target[:, :-1].clamp(0)], 1)}
    return Batch(inputs | {"decoder_attention_mask": mask}, {"labels": target}, tuple(rows))


def cross_entropy(outputs: Any, batch: Batch) -> LossTerms:
    labels = batch.targets["labels"].flatten()
    total = F.cross_entropy(outputs.float().flatten(0, -2), labels, ignore_index=IGNORE, reduction="sum")
    return LossTerms(total, (labels != IGNORE).sum(), {})


def train(
    world: World, name: str, *, shard: int = 1, replicate: int = 1, steps: int = 3, compute: Any = "fp32"
) -> dict[str, Any]:
    mesh = build_mesh(world, sizes=dict.fromkeys(AXES, 1) | {"dp_shard": shard, "dp_replicate": replicate})
    spec = ALL[name]
    model = meta_model(spec)
    parallel = parallelize(
        model, mesh, spec=spec, tensors=initial_tensors(spec, seed=1), device=world.device, layout=Layout(DTYPES[compute])
    )
    optim = OptimConfig(lr=2e-2)
    engine = NativeEngine(
        parallel, objective=cross_entropy, optimizer=make_optimizer(optim, model=model, device=world.device),
        schedule=make_schedule(ScheduleConfig(name="constant", warmup=0), peak=optim.lr, steps=steps), clip=1.0, penalty=None,
        precision=PrecisionConfig(compute=compute), device=world.device, rank=world.rank,
    )  # fmt: skip
    losses = []
    for step in range(steps):
        size = 8 // mesh.dp_size
        first = step % 4 * 8 + mesh.dp_rank * size
        losses.append(float(engine.train_step([task_of(name, range(first, first + size))], samples=range(8)).loss))
    return {"losses": losses, "weights": {n: t.numpy().copy() for n, t in engine.full_tensors()}}


@pytest.mark.parametrize("name", ALL)
def test_they_learn(name: str) -> None:
    losses = train(World(0, 1, 0, 1, torch.device("cpu")), name, steps=60)["losses"]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


@pytest.mark.parametrize("name", ALL)
def test_every_layout_computes_the_same(name: str, tmp_path: Path) -> None:
    (one,) = on_ranks(lambda world: train(world, name), 1, tmp_path)
    for layout in ({"replicate": 2}, {"shard": 2}):
        two = on_ranks(lambda world, layout=layout: train(world, name, **layout), 2, tmp_path)[0]  # type: ignore[misc]
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
        for key, value in one["weights"].items():
            assert abs(two["weights"][key] - value).max() < 1e-5, key


@pytest.mark.parametrize("name", ALL)
def test_they_train_in_bf16(name: str, tmp_path: Path) -> None:
    one = train(World(0, 1, 0, 1, torch.device("cpu")), name, compute="bf16")["losses"]
    two = on_ranks(lambda world: train(world, name, shard=2, compute="bf16"), 2, tmp_path)[0]["losses"]
    assert one == pytest.approx(train(World(0, 1, 0, 1, torch.device("cpu")), name)["losses"], rel=2e-2)
    assert two == pytest.approx(one, rel=2e-2)
