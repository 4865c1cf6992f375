from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distllm.config.errors import DataError
from distllm.config.schema import Config
from distllm.data.batch import IGNORE, Batch
from distllm.data.loader import Step, step_batches, validation_batches
from distllm.data.packed_text import PackedText
from distllm.data.prepare import prepare
from distllm.data.store import TokenStore, dtype_for, write_store
from tests.data.conftest import config_for, prose, write_lines


def unique_tokens(folder: Path, *, documents: int = 60, first: int = 300, name: str = "corpus") -> dict[str, Any]:
    """A token source in which no token comes twice, so that a token says where it is from."""
    lengths = np.random.default_rng(1).integers(3, 30, size=documents)
    ends = first + np.cumsum(lengths)
    write_store(folder / name, [np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)], dtype=dtype_for(70_000))
    return {"kind": "tokens", "path": str(folder / name)}


def samples_of(config: Config, monkeypatch: pytest.MonkeyPatch) -> PackedText:
    """Samples of a token source; its ids need no tokenizer of that size."""
    monkeypatch.setattr("distllm.data.prepare_text.largest_id", lambda store: 0)
    return PackedText(prepare(config), config)


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackedText:
    sources = [unique_tokens(tmp_path), {**unique_tokens(tmp_path, first=5000, name="other"), "weight": 0.5}]
    return samples_of(config_for(tmp_path / "store", sources=sources, seq_len=16, validation={"fraction": 0.2}), monkeypatch)


def sequence(batches: list[list[list[Batch]]], *, accumulation: int, dp_size: int) -> tuple[list[int], np.ndarray]:
    """The samples of several ranks in global order: their numbers and tokens."""
    ids: list[int] = []
    rows = []
    for step in range(len(batches[0])):
        for a in range(accumulation):
            for rank in range(dp_size):
                batch = batches[rank][step][a]
                ids += batch.sample_ids
                rows.append(batch.inputs["input_ids"].numpy())
    return ids, np.concatenate(rows)


def steps_of(
    samples: PackedText, *, start: int = 0, micro: int = 2, accumulation: int = 1, rank: int = 0, size: int = 1, prefetch: int = 2
) -> Generator[Step]:
    samples.resolved = replace(
        samples.resolved, micro_batch=micro, accumulation=accumulation, dp_size=size, global_batch=micro * accumulation * size
    )
    return step_batches(samples, start=start, dp_rank=rank, dp_size=size, prefetch=prefetch, pin=False)


def take(samples: PackedText, steps: int, *, start: int = 0, micro: int = 2, accumulation: int = 1, rank: int = 0, size: int = 1,
         prefetch: int = 3) -> list[list[Batch]]:  # fmt: skip
    batches = steps_of(samples, start=start, micro=micro, accumulation=accumulation, rank=rank, size=size, prefetch=prefetch)
    taken = [step.microbatches for step in islice(batches, steps)]
    batches.close()
    return taken


@pytest.mark.parametrize("cross_documents", [True, False])
def test_the_order_is_one_sequence_for_any_ranks_and_after_a_resume(samples: PackedText, cross_documents: bool) -> None:
    samples.cross_documents = cross_documents
    expected = samples.train_batch(range(48)).inputs["input_ids"].numpy()
    for dp_size, accumulation, micro in ((1, 1, 12), (2, 1, 6), (2, 3, 2), (3, 2, 2), (4, 1, 3), (4, 3, 1), (1, 12, 1)):
        group = {"micro": micro, "accumulation": accumulation, "size": dp_size}
        whole = [take(samples, 4, rank=r, **group) for r in range(dp_size)]
        ids, rows = sequence(whole, accumulation=accumulation, dp_size=dp_size)
        assert ids == list(range(48)) and np.array_equal(rows, expected)
        resumed = [take(samples, 3, start=12, rank=r, prefetch=1, **group) for r in range(dp_size)]
        ids, rows = sequence(resumed, accumulation=accumulation, dp_size=dp_size)
        assert ids == list(range(12, 48)) and np.array_equal(rows, expected[12:])


def test_a_layout_may_change_at_a_resume(samples: PackedText) -> None:
    """4 ranks, then 2, then 3, each from the number of samples consumed."""
    seen: list[int] = []
    for size in (4, 2, 3):
        part = [take(samples, 2, start=len(seen), rank=r, size=size, micro=3) for r in range(size)]
        seen += sequence(part, accumulation=1, dp_size=size)[0]
    assert seen == list(range(54))


def test_samples_tile_the_training_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path / "store", sources=[unique_tokens(tmp_path)], seq_len=16, validation={"fraction": 0.2})
    samples = samples_of(config, monkeypatch)
    stream = samples.train[0].rows(np.array([0]), samples.train[0].n_tokens)[0]
    first, second = (samples.train_batch(range(e * samples.train_size, (e + 1) * samples.train_size)) for e in range(2))
    for epoch in (first, second):
        inputs = epoch.inputs["input_ids"].numpy()
        tokens = Counter(inputs.ravel().tolist())
        assert set(tokens.values()) == {1} and set(tokens) == set(stream[: 16 * samples.train_size].tolist())
        following = dict(pairwise(stream.tolist()))
        assert epoch.targets["labels"].numpy().ravel().tolist() == [following[t] for t in inputs.ravel().tolist()]
    assert not np.array_equal(first.inputs["input_ids"], second.inputs["input_ids"])


def test_seeds_give_other_orders_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = unique_tokens(tmp_path)
    rows, held = [], []
    for seed in (1, 2):
        config = config_for(tmp_path / "store", sources=[source], seq_len=16, validation={"fraction": 0.2}, seed=seed)
        samples = samples_of(config, monkeypatch)
        rows.append(samples.train_batch(range(10)).inputs["input_ids"].numpy())
        held.append(samples.validation_batch(range(samples.validation_size)).inputs["input_ids"].numpy())
    assert not np.array_equal(*rows) and not np.array_equal(*held)


@pytest.mark.parametrize("by", ["document", "position"])
def test_the_split_leaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    config = config_for(tmp_path / "store", sources=[unique_tokens(tmp_path)], seq_len=16, validation={"fraction": 0.2, "by": by})
    samples = samples_of(config, monkeypatch)

    def tokens(batch: Batch) -> set[int]:
        labels = batch.targets["labels"].numpy().ravel()
        counted = batch.targets["labels"].numpy() != IGNORE
        return {*batch.inputs["input_ids"].numpy()[counted].tolist(), *labels[labels != IGNORE].tolist()}

    train = tokens(samples.train_batch(range(2 * samples.train_size)))
    validation = tokens(samples.validation_batch(range(samples.validation_size)))
    assert train and validation and not train & validation
    offsets = TokenStore.open(tmp_path / "corpus").offsets + 300
    if by == "document":
        for a, b in pairwise(offsets.tolist()):
            assert not (set(range(a, b)) & train and set(range(a, b)) & validation)


@pytest.mark.parametrize("cross_documents", [True, False])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_validation_covers_every_token_once(samples: PackedText, dp_size: int, cross_documents: bool) -> None:
    samples.cross_documents = cross_documents
    ranks = [list(validation_batches(samples, micro_batch=3, dp_rank=r, dp_size=dp_size, limit=0)) for r in range(dp_size)]
    assert len({len(r) for r in ranks}) == 1
    labels: Counter[int] = Counter()
    for batch in (b for r in ranks for b in r):
        found = batch.targets["labels"].numpy()
        assert found.shape == (3, 16)
        labels.update(found[found != IGNORE].tolist())
        for i, row in zip(batch.sample_ids, found, strict=True):
            assert (i == -1) == bool((row == IGNORE).all())
    expected: set[int] = set()
    for stream in samples.validation:
        tokens = stream.rows(np.array([0]), stream.n_tokens)[0]
        inner = np.ones(len(tokens), dtype=bool) if cross_documents else ~stream.begins(np.array([0]), len(tokens))[0]
        inner[0] = False  # nothing comes before the first token
        expected |= set(tokens[inner].tolist())
    assert set(labels) == expected and set(labels.values()) == {1}


def test_a_limit_spreads_over_the_whole_validation_text(samples: PackedText) -> None:
    size = samples.validation_size
    seen = []
    for rank in range(2):
        batches = list(validation_batches(samples, micro_batch=2, dp_rank=rank, dp_size=2, limit=3))
        assert len(batches) == 3
        seen += [i for b in batches for i in b.sample_ids]
    assert len(set(seen)) == 12 and min(seen) == 0 and max(seen) >= size * 11 // 12 and -1 not in seen
    more_than_all = list(validation_batches(samples, micro_batch=2, dp_rank=0, dp_size=1, limit=10_000))
    assert sorted(i for b in more_than_all for i in b.sample_ids if i >= 0) == list(range(size))


def test_attention_inside_documents(samples: PackedText) -> None:
    samples.cross_documents = False
    begins = {int(o) for s in samples.train for o in s.store.tokens[s.store.offsets[:-1]]}
    batch = samples.train_batch(range(samples.train_size))
    inputs, labels = batch.inputs["input_ids"].numpy(), batch.targets["labels"].numpy()
    positions, mask = batch.inputs["position_ids"].numpy(), batch.inputs["attention_mask"].numpy()
    starts = np.isin(inputs, list(begins))
    document = np.cumsum(starts, axis=1)
    same = document[:, :, None] == document[:, None, :]
    assert np.array_equal(mask[:, 0], same & np.tril(np.ones((16, 16), dtype=bool)))
    assert (positions[starts] == 0).all() and starts.sum() > 50
    assert not set(labels.ravel().tolist()) & begins
    assert ((labels == IGNORE).sum(axis=1) <= starts.sum(axis=1) + 1).all()


def test_tiny_shakespeare_is_cut_as_everybody_cuts_it(tmp_path: Path, shakespeare: Path) -> None:
    """The first 90 % of the characters train, the last 10 % validate; 65 characters and the end mark."""
    config = config_for(
        tmp_path / "store", sources=[{"kind": "text", "path": str(shakespeare)}], tokenizer={"kind": "chars"}, seq_len=64,
        validation={"by": "position", "fraction": 0.1},
    )  # fmt: skip
    prepared = prepare(config)
    samples = PackedText(prepared, config)
    text = shakespeare.read_text()
    assert prepared.vocab_size == len(set(text)) + 1
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    assert samples.train[0].n_tokens == cut
    validation = samples.validation[0].rows(np.array([0]), samples.validation[0].n_tokens)[0]
    assert validation.tolist() == [*(number[c] for c in text[cut:]), len(number)]
    assert samples.train_size == (cut - 1) // 64
    assert 2 < samples.unigram_loss() < 4


@pytest.mark.parametrize("cross_documents", [True, False])
def test_unigram_loss_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cross_documents: bool) -> None:
    write_store(tmp_path / "a", [np.array([1, 1, 2, 0])] * 20, dtype=dtype_for(300))
    write_store(tmp_path / "b", [np.array([3, 0])] * 20, dtype=dtype_for(300))
    write_store(tmp_path / "v", [np.array([1, 3, 2, 0]), np.array([2, 0])], dtype=dtype_for(300))
    sources = [{"kind": "tokens", "path": str(tmp_path / "a"), "weight": 3.0}, {"kind": "tokens", "path": str(tmp_path / "b")}]
    config = config_for(
        tmp_path / "store", sources=sources, validation={"sources": [{"kind": "tokens", "path": str(tmp_path / "v")}]}, seq_len=4,
        cross_documents=cross_documents,
    )  # fmt: skip
    samples = PackedText(prepare(config), config)

    def p(a: int, b: int) -> float:
        return 0.75 * (a + 1) / (80 + 257) + 0.25 * (b + 1) / (40 + 257)

    labels = [p(0, 20), p(20, 0), p(20, 20), p(20, 0), p(20, 20)]  # of 3 2 0 2 0: the first token is never predicted
    if not cross_documents:
        del labels[3]
    assert samples.unigram_loss() == pytest.approx(-sum(map(math.log, labels)) / len(labels), rel=1e-12)
    batches = validation_batches(samples, micro_batch=2, dp_rank=0, dp_size=1, limit=0)
    assert sum(int((b.targets["labels"] != IGNORE).sum()) for b in batches) == len(labels)


def test_a_unigram_of_a_large_text_counts_pieces(samples: PackedText, monkeypatch: pytest.MonkeyPatch) -> None:
    samples.vocab_size = 10_000
    exact = samples.unigram_loss()
    monkeypatch.setattr("distllm.data.packed_text.COUNTED_AT_ONCE", 10)
    assert samples.unigram_loss() == pytest.approx(exact, rel=1e-12)
    monkeypatch.setattr("distllm.data.packed_text.COUNTED", 200)
    assert samples.unigram_loss() == pytest.approx(exact, rel=0.1)


def lines(tmp_path: Path, documents: int) -> list[dict[str, Any]]:
    return [{"kind": "text", "path": str(write_lines(tmp_path / "l.txt", documents=documents)), "document": "line"}]


def refused(config: Config) -> str:
    with pytest.raises(DataError) as error:
        PackedText(prepare(config), config)
    assert "\n" not in str(error.value)
    return str(error.value)


def nearest(message: str, key: str) -> str:
    """The value after the last `key=` of a message."""
    return message.rsplit(f"{key}=", 1)[1].split(";")[0].split()[0]


def test_a_text_shorter_than_a_sample_names_the_longest_that_works(tmp_path: Path) -> None:
    sources = lines(tmp_path, 10)
    message = refused(config_for(tmp_path / "s", sources=sources, seq_len=5000))
    assert "data.seq_len=5000" in message
    longest = int(nearest(message, "data.seq_len"))
    config = config_for(tmp_path / "s", sources=sources, seq_len=longest)
    assert PackedText(prepare(config), config).train_size == 1
    assert nearest(refused(config_for(tmp_path / "s", sources=sources, seq_len=longest + 1)), "data.seq_len") == str(longest)


@pytest.mark.parametrize("by", ["document", "position"])
def test_no_validation_text_names_a_fraction_that_works(tmp_path: Path, by: str) -> None:
    sources = lines(tmp_path, 100)
    config = config_for(tmp_path / "s", sources=sources, seq_len=8, validation={"by": by, "fraction": 0.0})
    message = refused(config)
    assert "data.validation.fraction=0.0: no validation text" in message
    works = float(message.split("; ")[1].split()[0])
    config = config_for(tmp_path / "s", sources=sources, seq_len=8, validation={"by": by, "fraction": works})
    assert PackedText(prepare(config), config).validation_size > 0


def test_everything_held_out_and_one_document(tmp_path: Path) -> None:
    sources = lines(tmp_path, 100)
    everything = config_for(tmp_path / "s", sources=sources, validation={"fraction": 1.0})
    assert "lower data.validation.fraction=1.0" in refused(everything)
    (tmp_path / "one.txt").write_text(prose(3000), encoding="utf-8")
    config = config_for(tmp_path / "s", sources=[{"kind": "text", "path": str(tmp_path / "one.txt")}])
    assert "use data.validation.by=position" in refused(config)


def test_the_thread_ends_with_the_iterator(samples: PackedText) -> None:
    before = threading.active_count()
    for n in (1, 2, 8):
        batches = steps_of(samples, prefetch=n)
        next(batches)
        assert threading.active_count() == before + 1
        batches.close()
        assert threading.active_count() == before
    batches = steps_of(samples, prefetch=2)
    next(batches)
    del batches
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_consumer_at_its_step(samples: PackedText, monkeypatch: pytest.MonkeyPatch) -> None:
    real = samples.train_batches

    def failing(ids: Any) -> list[Batch]:
        if any(max(batch) >= 12 for batch in ids):
            raise OSError("the disk is gone")
        return real(ids)

    monkeypatch.setattr(samples, "train_batches", failing)
    before = threading.active_count()
    batches = steps_of(samples, prefetch=4)
    good = 0
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in batches:
            good += 1
    assert good == 6 and threading.active_count() == before


def test_a_forgotten_iterator_does_not_hold_the_process(tmp_path: Path) -> None:
    write_lines(tmp_path / "l.txt", documents=200)
    code = """
import sys
from pathlib import Path
from distllm.data.loader import step_batches
from distllm.data.packed_text import PackedText
from distllm.data.prepare import prepare
from tests.data.conftest import config_for
folder = Path(sys.argv[1])
source = {"kind": "text", "path": str(folder / "l.txt"), "document": "line"}
config = config_for(folder / "s", sources=[source], seq_len=8)
samples = PackedText(prepare(config), config)
kept = step_batches(samples, start=0, dp_rank=0, dp_size=1, prefetch=2, pin=False)
next(kept)
print("end")
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_large_steps_are_not_made_far_ahead(samples: PackedText, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 steps ahead of a long sequence with a mask [S, S] would be more memory than the model."""
    made: list[int] = []
    real = samples.train_batches
    monkeypatch.setattr(samples, "train_batches", lambda ids: made.append(len(ids)) or real(ids))
    samples.cross_documents = False
    assert samples.batch_bytes(2) == sum(
        tensor.nbytes for part in (lambda b: (b.inputs, b.targets))(samples.train_batch(range(2))) for tensor in part.values()
    )
    take(samples, 1, prefetch=16)
    assert made.pop() == 8
    monkeypatch.setattr("distllm.data.loader.AHEAD_BYTES", 3 * samples.batch_bytes(2))
    del made[:]
    take(samples, 4, prefetch=16)
    assert set(made) == {1}
