"""Whole runs: the same answer under every layout, resumed or not; stopping, skipping, refusing."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distllm.comm import World
from distllm.config.errors import EXIT_OK, EXIT_STOPPED, ConfigError, DataError, DivergedError, StorageError
from distllm.config.schema import Config, EngineConfig, TuneConfig
from distllm.data.tokenizer import Roles, folder_digest
from distllm.engine.base import LossTerms
from distllm.models.build import meta_model, resolve_spec
from distllm.train import build as building
from distllm.train import loop
from distllm.train import validate as validating
from distllm.train.build import Position, Run, build, close
from distllm.train.loop import train
from distllm.train.objectives import causal_lm
from distllm.train.stopping import Best
from tests.ranks import on_ranks
from tests.runs import losses, metrics, run_tiny, state, tiny_config, words

ONE = World(0, 1, 0, 1, torch.device("cpu"))
LAYOUTS = {
    "one": (1, ()),
    "ddp2": (2, ("layout.dp_replicate=2", "layout.dp_shard=1")),
    "fsdp2": (2, ("layout.dp_shard=2",)),
    "fsdp4": (4, ("layout.dp_shard=4",)),
    "hsdp4": (4, ("layout.dp_replicate=2", "layout.dp_shard=2")),
}


def run(folder: Path, layout: str, *overrides: str) -> list[Any]:
    ranks, axes = LAYOUTS[layout]
    config = tiny_config(folder, *axes, *overrides)
    return on_ranks(lambda world: run_tiny(world, config), ranks, folder / "ranks")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of one process, 12 steps."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(folder, "one") == [EXIT_OK]
    return folder / "runs" / "tiny"


def test_it_learns_and_leaves_what_it_says(unbroken: Path) -> None:
    curve = losses(unbroken)
    assert list(curve) == list(range(1, 13)) and curve[12] < curve[1] - 0.5
    lines = metrics(unbroken)
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8, 12]
    wanted = {"samples", "tokens", "loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "data_wait_s", "peak_memory_bytes"}
    assert wanted <= lines[0].keys()
    assert lines[-2]["samples"] == 12 * 8 and lines[-2]["tokens"] == 12 * 8 * 32
    assert sorted(p.name for p in (unbroken / "checkpoints").iterdir() if p.name[0] != ".") == ["step-12", "step-8"]
    for name in ("config.yaml", "samples.txt", "summary.json", "logs/rank-0.log", "tokenizer/tokenizer.json"):
        assert (unbroken / name).stat().st_size > 0
    logged = [line for line in (unbroken / "logs/rank-0.log").read_text().splitlines() if "gradient norm" in line]
    assert [bool(re.search(r", \d+:\d\d left$", line)) for line in logged] == [True] * (len(logged) - 1) + [False]


def test_what_is_left_is_told_at_the_speed_of_this_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    clock = loop._Clock(5000.0, 20)
    now[0] += 30.0
    assert [clock.left(step, of=80) for step in (20, 30, 50, 80)] == ["", ", 2:30 left", ", 0:30 left", ""]


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2", "fsdp4", "hsdp4"])
def test_every_layout_gives_the_same_losses(layout: str, unbroken: Path, tmp_path: Path) -> None:
    assert set(run(tmp_path, layout)) == {EXIT_OK}
    found, wanted = losses(tmp_path / "runs" / "tiny"), losses(unbroken)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=0, atol=2e-6)
    assert found.keys() == wanted.keys()


def stop_at(step: int) -> Any:
    """A `train` that gets SIGTERM while it logs `step`."""

    def train_until(config: Config) -> Any:
        def rank(world: World) -> int:
            made = build(config, world)
            log = made.tracker.log

            def watch(at: int, values: Any) -> None:
                if at == step and "loss" in values:
                    os.kill(os.getpid(), signal.SIGTERM)
                log(at, values)

            made.tracker.log = watch  # type: ignore[method-assign]
            return train(made)

        return rank

    return train_until


def broken_run(folder: Path, layout: str, *, step: int) -> None:
    ranks, axes = LAYOUTS[layout]
    config = tiny_config(folder, *axes)
    assert set(on_ranks(stop_at(step)(config), ranks, folder / "ranks")) == {EXIT_STOPPED}
    assert max(losses(folder / "runs" / "tiny")) < 12


@pytest.mark.parametrize("layout", ["one", "ddp2", "fsdp2", "hsdp4"])
def test_a_resumed_run_is_bitwise_the_unbroken_one(layout: str, unbroken: Path, tmp_path: Path) -> None:
    whole = unbroken
    if layout != "one":
        run(tmp_path / "whole", layout)
        whole = tmp_path / "whole" / "runs" / "tiny"
    broken_run(tmp_path, layout, step=5)
    assert set(run(tmp_path, layout)) == {EXIT_OK}
    there = tmp_path / "runs" / "tiny"
    assert losses(there) == losses(whole)
    found, wanted = state(there), state(whole)
    assert found.keys() == wanted.keys() and any("exp_avg_sq" in name for name in found)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("first", "then"),
    [("one", "fsdp2"), ("fsdp2", "one"), ("ddp2", "fsdp4"), ("fsdp4", "hsdp4"), ("hsdp4", "ddp2"), ("one", "hsdp4")],
)
def test_a_run_continues_on_another_layout(first: str, then: str, unbroken: Path, tmp_path: Path) -> None:
    broken_run(tmp_path, first, step=5)
    assert set(run(tmp_path, then)) == {EXIT_OK}
    found, wanted = losses(tmp_path / "runs" / "tiny"), losses(unbroken)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=0, atol=2e-6)


@pytest.fixture
def in_process() -> Iterator[Any]:
    """Builds runs of one process, closed after the test."""
    made: list[Run] = []

    def start(folder: Path, *overrides: str, prepared: bool = True) -> Run:
        made.append(build(tiny_config(folder, *overrides, prepared=prepared), ONE))
        return made[-1]

    yield start
    for run in made:
        close(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("phase", ["validate", "save", "sample_text"])
def test_a_signal_in_any_phase_saves_and_stops(
    in_process: Any, number: signal.Signals, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = in_process(tmp_path, "train.sample_every=6")
    real, sent = getattr(loop, phase), []

    def while_signalled(*args: Any, **settings: Any) -> Any:
        if not sent:
            sent.append(made.engine.updates)
            os.kill(os.getpid(), number)
        return real(*args, **settings)

    monkeypatch.setattr(loop, phase, while_signalled)
    assert train(made) == EXIT_STOPPED
    (asked,) = sent
    assert asked < made.engine.updates <= asked + 1
    newest = sorted(int(p.name[5:]) for p in (tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*"))[-1]
    assert newest == made.engine.updates
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "layout.dp_shard=2", "train.steps=200", "train.eval_every=0", "checkpoint.every=0")

    def rank(world: World) -> tuple[int, int]:
        made = build(config, world)
        if world.rank == 1:
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        code = train(made)
        return code, made.engine.updates

    (code0, step0), (code1, step1) = on_ranks(rank, 2, tmp_path / "ranks")
    assert (code0, code1) == (EXIT_STOPPED, EXIT_STOPPED)
    assert step0 == step1 < 200
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / f"step-{step0}").is_dir()


def poison(samples: range) -> Any:
    """An objective whose loss is infinite for batches that hold one of `samples`."""

    def objective(outputs: Any, batch: Any) -> LossTerms:
        terms = causal_lm(outputs, batch)
        bad = any(i in samples for i in batch.sample_ids) and torch.is_grad_enabled()
        return replace(terms, sum=terms.sum * float("inf")) if bad else terms

    return objective


def test_a_skipped_batch_is_logged_and_the_run_goes_on(in_process: Any, tmp_path: Path) -> None:
    made = in_process(tmp_path)
    made.engine._objective = poison(range(17, 18))
    assert train(made) == EXIT_OK
    folder = tmp_path / "runs" / "tiny"
    assert list(losses(folder)) == list(range(1, 13))  # twelve updates, and one batch more was read
    assert metrics(folder)[-2]["samples"] == 13 * 8 and metrics(folder)[-2]["skipped"] == 1
    assert "step 3 skipped: the loss is not finite; samples 16 to 23" in (folder / "logs" / "rank-0.log").read_text()


def test_too_many_skips_in_a_row_stop_the_run_with_a_good_checkpoint(in_process: Any, tmp_path: Path) -> None:
    made = in_process(tmp_path, "train.max_skips=3")
    made.engine._objective = poison(range(40, 10**6))
    with pytest.raises(DivergedError, match=r"3 steps in a row .* is saved as step 5 in .*checkpoints; try a lower optim.lr"):
        train(made)
    again = in_process(tmp_path, "train.max_skips=3")
    assert (again.engine.updates, again.start.samples, again.start.skipped) == (5, 64, 3)  # past the bad samples
    assert all(np.isfinite(value).all() for value in state(tmp_path / "runs" / "tiny").values())


def test_another_run_in_the_folder_is_refused_by_the_key_that_differs(in_process: Any, unbroken: Path) -> None:
    base = unbroken.parent.parent
    with pytest.raises(ConfigError, match=r"holds another run: it differs in optim\.lr; use another name"):
        in_process(base, "optim.lr=0.02")
    with pytest.raises(ConfigError, match=r"resume=never: .* already holds a run"):
        in_process(base, "resume=never")
    more = in_process(base, "train.steps=13")  # longer is the same run
    assert more.engine.updates == 12


def test_a_start_that_failed_before_its_first_step_does_not_hold_the_folder(in_process: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GiB"):
        in_process(tmp_path, "model.sizes.hidden_size=65536", "model.sizes.num_hidden_layers=200")
    assert (tmp_path / "runs" / "tiny" / "config.yaml").exists()
    assert in_process(tmp_path).engine.updates == 0


def test_a_run_that_is_done_says_so_and_touches_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "fsdp2", "train.steps=4") == [EXIT_OK] * 2
    there = tmp_path / "runs" / "tiny"
    before = {name: (there / name).read_bytes() for name in ("summary.json", "metrics.jsonl", "samples.txt")}
    assert run(tmp_path, "fsdp2", "train.steps=4") == [EXIT_OK] * 2
    assert {name: (there / name).read_bytes() for name in before} == before
    assert f"{there} is done, 4 steps; to train on: distllm train {there} train.steps=8" in capfd.readouterr().err
    assert run(tmp_path, "one", "train.steps=8") == [EXIT_OK] and max(losses(there)) == 8


def test_a_wrong_model_is_told_before_the_text_is_read(in_process: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hiden_size"):
        in_process(tmp_path / "a", "model.sizes.hiden_size=3", "data.sources.0.path=nowhere.txt", prepared=False)


def test_a_folder_that_holds_something_else_is_refused(in_process: Any, tmp_path: Path) -> None:
    there = tmp_path / "runs" / "tiny"
    there.mkdir(parents=True)
    (there / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"is not empty and holds no run"):
        in_process(tmp_path)
    assert (there / "thesis.txt").read_text() == "precious"


def test_a_new_run_can_start_from_a_checkpoint_of_another(in_process: Any, unbroken: Path, tmp_path: Path) -> None:
    made = in_process(tmp_path, f"resume={unbroken / 'checkpoints' / 'step-8'}")
    assert (made.engine.updates, made.start.samples) == (8, 64)
    assert train(made) == EXIT_OK
    found, wanted = losses(tmp_path / "runs" / "tiny"), losses(unbroken)
    assert found == {step: loss for step, loss in wanted.items() if step > 8}
    again = in_process(tmp_path, f"resume={unbroken / 'checkpoints' / 'step-8'}")
    assert again.engine.updates == 12  # its own newest checkpoint comes first


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_by_the_clock(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 30 s of a clock of one tick a step: a save each third step, once, also where the answer comes a step late."""
    shard = f"layout.dp_shard={ranks}"
    config = tiny_config(tmp_path, shard, "checkpoint.every=0", "checkpoint.every_minutes=0.5", "checkpoint.keep=99")

    def rank(world: World) -> list[int]:
        made, saves, now = build(config, world), [], [0.0]
        real_step, real_save = made.engine.train_step, loop.save

        def step(*args: Any, **settings: Any) -> Any:
            now[0] += 10.0
            return real_step(*args, **settings)

        def save(run: Run, *, position: Any) -> None:
            saves.append(run.engine.updates)
            real_save(run, position=position)

        made.engine.train_step = step  # type: ignore[method-assign]
        monkeypatch.setattr(loop, "save", save)
        monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
        assert train(made) == EXIT_OK
        return saves

    late = ranks > 1  # ranks learn of each other's clocks one step later
    wanted = [4, 8, 12] if late else [3, 6, 9, 12]
    assert on_ranks(rank, ranks, tmp_path / "ranks") == [wanted] * ranks


GPT2 = ("model.type=gpt2", 'model.sizes={"n_layer": 2, "n_embd": 32, "n_head": 2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}')


@pytest.mark.parametrize("layout", ["one", "ddp2"])
def test_dropout_goes_on_where_it_was(layout: str, tmp_path: Path) -> None:
    """Bitwise, though text was sampled in between: the generators come back, and the model goes back to training."""
    ranks, axes = LAYOUTS[layout]
    settings = (*axes, *GPT2, "train.sample_every=3")
    whole = tiny_config(tmp_path / "whole", *settings)
    assert set(on_ranks(lambda world: run_tiny(world, whole), ranks, tmp_path / "a")) == {EXIT_OK}
    broken = tiny_config(tmp_path / "broken", *settings)
    assert set(on_ranks(stop_at(5)(broken), ranks, tmp_path / "b")) == {EXIT_STOPPED}
    assert set(on_ranks(lambda world: run_tiny(world, broken), ranks, tmp_path / "c")) == {EXIT_OK}
    there, here = tmp_path / "whole" / "runs" / "tiny", tmp_path / "broken" / "runs" / "tiny"
    assert losses(here) == losses(there) and len(losses(there)) == 12
    dry = tiny_config(tmp_path / "dry", *axes, *GPT2[:1], GPT2[1].replace("0.2", "0.0"))
    assert set(on_ranks(lambda world: run_tiny(world, dry), ranks, tmp_path / "d")) == {EXIT_OK}
    without = losses(tmp_path / "dry" / "runs" / "tiny")
    assert all(without[step] != losses(there)[step] for step in (1, 4, 7, 12))  # dropout was on all the way


def test_a_run_does_not_go_on_with_other_text(in_process: Any, tmp_path: Path) -> None:
    broken_run(tmp_path, "one", step=5)
    (tmp_path / "text.txt").write_text(words(4000, seed=8), encoding="utf-8")
    with pytest.raises(DataError, match=r"the text of data\.sources has changed since this run began"):
        in_process(tmp_path)
    newest = tmp_path / "runs" / "tiny" / "checkpoints" / "step-6"
    made = in_process(tmp_path, "name=other", f"resume={newest}")
    assert made.engine.updates == 6  # asked for by name, other text is another stage of training


def test_a_run_does_not_go_on_with_another_tokenizer(in_process: Any, tmp_path: Path) -> None:
    broken_run(tmp_path, "one", step=5)
    newest = tmp_path / "runs" / "tiny" / "checkpoints" / "step-6"
    with pytest.raises(DataError, match=r"was trained with another tokenizer, .*set data\.tokenizer\.kind=hf"):
        in_process(tmp_path, "name=other", f"resume={newest}", "data.tokenizer.kind=chars")


def test_a_start_corrected_after_it_failed_keeps_no_old_tokenizer(in_process: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GiB"):
        in_process(tmp_path, "data.tokenizer.kind=chars", "model.sizes.hidden_size=65536", "model.sizes.num_hidden_layers=200")
    made = in_process(tmp_path)
    assert folder_digest(made.folder.tokenizer) == made.data.tokenizer


def test_a_validation_loss_that_is_not_finite_is_told_and_never_the_best(
    in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = in_process(tmp_path)
    real, values = validating.evaluate, iter([math.nan, 3.0, 4.0, 4.0])
    monkeypatch.setattr(validating, "evaluate", lambda *a, **k: replace(real(*a, **k), loss=next(values)))
    assert train(made) == EXIT_OK
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert (summary["best_value"], summary["best_step"]) == (3.0, 8)


def test_a_write_that_failed_is_told_before_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, "layout.dp_shard=2", "train.steps=400", "train.eval_every=0", "checkpoint.every=100")

    def rank(world: World) -> tuple[str, int]:
        made = build(config, world)
        if world.rank == 1:
            monkeypatch.setattr("distllm.checkpoint.sharded.write_rank", fail)
        with pytest.raises(StorageError) as caught:
            train(made)
        return str(caught.value), made.engine.updates

    def fail(*args: Any, **settings: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (text0, step0), (text1, step1) = on_ranks(rank, 2, tmp_path / "ranks")
    assert text0 == text1 and "step 100" in text0
    assert 100 < step0 == step1 < 200


def test_a_model_that_cannot_fit_is_refused_before_memory_is_taken(in_process: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: [\d,]+ parameters need at least [\d,.]+ GiB .* cpu has .* GiB; give smaller"):
        in_process(tmp_path, "model.sizes.hidden_size=65536", "model.sizes.num_hidden_layers=200")


def test_memory_is_counted_for_what_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which the head alone learns fits where its gradients and optimizer state would not."""
    config = tiny_config(tmp_path, "model.sizes.tie_word_embeddings=false", prepared=False)
    spec = resolve_spec(config, vocab_size=257, labels={}, roles=Roles(eos=256, pad=None, begin=None, separator=None, mask=None))
    weights = 4 * sum(p.numel() for p in meta_model(spec).parameters())
    monkeypatch.setattr(building, "memory_of", lambda device: 3 * weights)
    with pytest.raises(ConfigError, match="GiB"):
        building.refuse_too_large(config, spec, ONE, shards=1)
    building.refuse_too_large(config, spec, ONE, shards=2)
    head = config.model_copy(update={"tune": TuneConfig(train="head")})
    building.refuse_too_large(head, spec, ONE, shards=1)


def test_what_lies_in_files_takes_no_memory_but_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, prepared=False)
    spec = resolve_spec(config, vocab_size=257, labels={}, roles=Roles(eos=256, pad=None, begin=None, separator=None, mask=None))
    weights = 4 * sum(p.numel() for p in meta_model(spec).parameters())
    monkeypatch.setattr(building, "memory_of", lambda device: weights)
    kept = EngineConfig(name="deepspeed", zero_stage=3, offload_optimizer="cpu", offload_parameters="nvme", nvme_path="/disk")
    files = kept.model_copy(update={"offload_optimizer": "nvme"})
    with pytest.raises(ConfigError, match="GiB for fp32 weights, gradients and adamw state, and cpu has"):
        building.refuse_too_large(config.model_copy(update={"engine": kept}), spec, ONE, shards=1)
    building.refuse_too_large(config.model_copy(update={"engine": files}), spec, ONE, shards=1)
    gpu = replace(ONE, device=torch.device("cuda"))  # the memory of the CPU has the state then
    building.refuse_too_large(config.model_copy(update={"engine": kept}), spec, gpu, shards=1)
    monkeypatch.setattr(building, "memory_of", lambda device: weights - 1)
    with pytest.raises(ConfigError, match=r"GiB for fp32 weights at the start, and cpu has .*, or more ranks in layout.tp"):
        building.refuse_too_large(config.model_copy(update={"engine": files}), spec, ONE, shards=8)


def test_what_an_evaluation_decides_all_ranks_decide_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a tp axis compute the same loss side by side; a last bit that differs must not part them."""
    config = tiny_config(tmp_path, "layout.tp=2", "layout.dp_shard=1", "model.sizes.vocab_size=258", "train.keep_best=true")
    real = validating.evaluate

    def rank(world: World) -> tuple[float, bool]:
        monkeypatch.setattr(validating, "evaluate", lambda *a, **k: replace(real(*a, **k), loss=3.0 + 1e-9 * world.rank))
        made = build(config, world)
        at = Position(best=Best("val_loss", 3.0 + 1e-10, 1, 0))
        _, found, judgement = validating.validate(made, 2, at, limit=1)
        close(made)
        return found.loss, judgement.improved

    assert on_ranks(rank, 2, tmp_path / "ranks") == [(3.0, True)] * 2
