from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from distllm.config.errors import DataError
from distllm.config.schema import Config
from distllm.data import prepare as prepare_module
from distllm.data import prepare_text
from distllm.data import source as source_module
from distllm.data import tokenise as tokenise_module
from distllm.data.prepare import open_prepared, prepare
from distllm.data.store import bin_path, dtype_for, idx_path, write_store
from tests.data.conftest import config_for, prose, write_lines
from tests.data.test_store import read_as_megatron
from tests.data.victim import killed


def store_bytes(config: Config) -> dict[str, bytes]:
    """Everything that was prepared for a config, by file name."""
    folder = prepare(config).tokenizer_folder.parent
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines_config(tmp_path: Path, *, store: str = "store", documents: int = 400, **data: Any) -> Config:
    path = write_lines(tmp_path / "lines.txt", documents=documents)
    return config_for(tmp_path / store, sources=[{"kind": "text", "path": str(path), "document": "line"}], **data)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 3000)


@pytest.mark.parametrize("kind", ["bpe", "chars", "bytes"])
def test_the_store_holds_every_document_and_its_end(tmp_path: Path, small_shards: None, kind: str) -> None:
    config = lines_config(tmp_path, tokenizer={"kind": kind, "vocab_size": 400})
    prepared = prepare(config)
    tokenizer = AutoTokenizer.from_pretrained(str(prepared.tokenizer_folder))
    letter, documents = read_as_megatron(prepared.stores[0].prefix)
    assert letter == "H" and prepared.vocab_size == len(tokenizer)
    assert all(d[-1] == tokenizer.eos_token_id for d in documents)
    expected = (tmp_path / "lines.txt").read_text().splitlines()
    assert [tokenizer.decode(d[:-1]) for d in documents] == expected
    assert [d[:-1] for d in documents] == tokenizer(expected)["input_ids"]


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
@pytest.mark.parametrize("kind", ["bpe", "chars", "bytes"])
def test_shards_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, document: str) -> None:
    """The bytes are those of one shard, also where one document lies in many."""
    indented = re.sub(r"\n(?=[T-Z])", "\n    ", prose(60_000))  # a cut before an indent would change ids
    (tmp_path / "a.txt").write_text(indented, encoding="utf-8")
    (tmp_path / "b.txt").write_text(prose(700, seed=1), encoding="utf-8")
    sources = [{"kind": "text", "path": str(tmp_path / "?.txt"), "document": document}]
    made = []
    for name in ("one", "many"):
        config = config_for(tmp_path / name, sources=sources, tokenizer={"kind": kind, "vocab_size": 400, "train_bytes": 100_000})
        if name == "many":  # the merges learned depend on which shard comes first, so take the same tokenizer
            folder = tmp_path / "many" / prepare_module._plan(config).folder.name
            staging = folder.with_name(f".preparing-{folder.name}")
            shutil.copytree(tmp_path / "one" / folder.name / "tokenizer", staging / "tokenizer")
            monkeypatch.setattr(source_module, "SHARD_BYTES", 2000)
            assert len(prepare_module._plan(config).sources["train-000"].shards) > 10
        made.append(store_bytes(config))
    assert made[0] == made[1]


def test_the_workers_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None) -> None:
    monkeypatch.setattr(tokenise_module, "ONE_PROCESS_BYTES", 0)
    made = [
        store_bytes(lines_config(tmp_path, store=f"store-{n}", workers=n, tokenizer={"kind": "bpe", "vocab_size": 300}))
        for n in (1, 3)
    ]
    assert made[0] == made[1] and "train-000.bin" in made[0]


def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = lines_config(tmp_path)
    with pytest.raises(DataError, match="not prepared with this tokenizer; run `distllm prepare"):
        open_prepared(config)
    first = prepare(config)
    monkeypatch.setattr(prepare_module, "_make", None)
    assert prepare(config).digest == first.digest == open_prepared(config).digest
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == [f".lock-{first.digest}", first.digest]


def test_a_changed_text_or_tokenizer_is_another_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = lines_config(tmp_path)
    first = prepare(config)
    assert prepare(lines_config(tmp_path, tokenizer={"kind": "chars"})).digest != first.digest
    with (tmp_path / "lines.txt").open("a") as file:
        file.write("one more\n")
    with pytest.raises(DataError, match=f"{first.digest}: stale, the text has changed"):
        open_prepared(config)
    caplog.set_level("INFO")
    second = prepare(config)
    assert "has changed: preparing it again" in caplog.text
    assert second.digest != first.digest and second.stores[0].n_documents == first.stores[0].n_documents + 1


def test_what_does_not_decide_the_tokens_is_not_in_the_digest(tmp_path: Path) -> None:
    config = lines_config(tmp_path)
    other = lines_config(tmp_path, seq_len=8, workers=3, validation={"fraction": 0.2}, shuffle=False)
    moved = tmp_path / "moved.txt"
    shutil.copy(tmp_path / "lines.txt", moved)
    source = {"kind": "text", "path": str(moved), "document": "line", "weight": 3.0, "hint": "h", "column": "c"}
    assert {prepare(c).digest for c in (config, other, config_for(tmp_path / "store", sources=[source], seed=9))} == {
        prepare(config).digest
    }


@pytest.mark.parametrize("kind", ["tokenizer", "bin", "idx", "meta", "other store", "no tokenizer"])
def test_a_store_that_was_tampered_with(tmp_path: Path, kind: str) -> None:
    config = lines_config(tmp_path)
    folder = prepare(config).tokenizer_folder.parent
    if kind == "tokenizer":
        file = folder / "tokenizer" / "tokenizer.json"
        file.write_text(file.read_text() + "\n")
    elif kind == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    elif kind == "meta":
        (folder / "meta.json").write_text("{")
    elif kind == "other store":
        write_store(folder / "train-000", [np.array([1, 2])], dtype=dtype_for(300))
    else:
        file = folder / f"train-000.{kind}"
        file.write_bytes(file.read_bytes()[:-2])
    for function in (open_prepared, prepare):
        with pytest.raises(DataError) as error:
            function(config)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


def in_child(function: Callable[[], Any]) -> int:
    """Run a function in a forked child and return its exit code, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def test_killed_anywhere_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before each rename and flush of a preparation, one after another."""
    monkeypatch.setattr(source_module, "SHARD_BYTES", 8000)
    expected = store_bytes(lines_config(tmp_path, store="expected"))

    def die_at(point: int, config: Config) -> None:
        calls = 0
        for name in ("rename", "replace", "fsync"):
            real = getattr(os, name)

            def dying(*args: Any, real: Any = real) -> Any:
                nonlocal calls
                calls += 1
                if calls > point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            setattr(os, name, dying)
        prepare(config)

    for point in range(100):
        config = lines_config(tmp_path, store=f"store-{point}")
        code = in_child(lambda point=point, config=config: die_at(point, config))  # type: ignore[misc]
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if not list(Path(config.data.store).glob("[!.]*/meta.json")):  # killed before the last rename
            with pytest.raises(DataError, match="not prepared"):
                open_prepared(config)
        assert store_bytes(config) == expected
        assert not list(Path(config.data.store).glob(".preparing-*"))
    assert point >= 10


def test_what_was_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None) -> None:
    config, done = lines_config(tmp_path), []
    real = tokenise_module.tokenise

    def third_fails(task: Any) -> int:
        if len(done) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(task.part.name)
        return real(task)

    monkeypatch.setattr(tokenise_module, "tokenise", third_fails)
    with pytest.raises(OSError, match="No space left"):
        prepare(config)
    again: list[str] = []
    monkeypatch.setattr(tokenise_module, "tokenise", lambda task: again.append(task.part.name) or real(task))
    prepare(config)
    assert len(done) == 3 and again and not set(done) & set(again)


@pytest.mark.parametrize("place", ["a part", "the store", "the index", "meta"])
def test_a_full_disk_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    config = lines_config(tmp_path)

    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if place == "a part":
            patch.setattr(np, "save", full)
        elif place == "the store":
            patch.setattr(shutil, "copyfileobj", full)
        elif place == "the index":
            patch.setattr(prepare_text, "write_index", full)
        else:
            patch.setattr(prepare_module, "_write_flushed", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(config)
    with pytest.raises(DataError, match="not prepared"):
        open_prepared(config)
    assert prepare(config).stores[0].n_documents == 400


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        prepare(lines_config(tmp_path, store="file"))


def test_several_at_once_make_one_store(tmp_path: Path, small_shards: None) -> None:
    config, context = lines_config(tmp_path), multiprocessing.get_context("fork")
    together = context.Barrier(3)

    def run() -> None:
        together.wait(30)
        prepare(config)

    children = [context.Process(target=run) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [c.exitcode for c in children] == [0, 0, 0]
    assert store_bytes(config) == store_bytes(lines_config(tmp_path, store="alone"))


KILLED = """
import os, sys
from pathlib import Path
from distllm.data import source, tokenise
from distllm.data.prepare import prepare
from tests.data.conftest import config_for
if __name__ == "__main__":
    source.SHARD_BYTES, tokenise.ONE_PROCESS_BYTES = 3000, 0
    real = tokenise._feed
    def feed(pool, todo, ahead):
        for task in real(pool, todo, ahead):
            print("a part is done", flush=True)
            sys.stdin.read()  # until this process is killed
            yield task
    tokenise._feed = feed
    prepare(config_for(Path(sys.argv[1]) / "store", workers=2,
                       sources=[{"kind": "text", "path": sys.argv[1] + "/lines.txt", "document": "line"}]))
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines.txt", documents=400)
    (tmp_path / "killed.py").write_text(KILLED)
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "killed.py"), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert parent.stdin is not None and parent.stdout is not None
    with parent.stdin, parent.stdout:
        assert parent.stdout.readline() == b"a part is done\n"
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) >= 2
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive


def test_a_killed_worker_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None) -> None:
    monkeypatch.setattr(tokenise_module, "ONE_PROCESS_BYTES", 0)
    monkeypatch.setattr(tokenise_module, "tokenise", killed)
    with pytest.raises(DataError, match=r"a tokenising process was killed.*data\.workers"):
        prepare(lines_config(tmp_path, workers=2))


def test_an_error_in_a_worker_comes_back_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None) -> None:
    monkeypatch.setattr(tokenise_module, "ONE_PROCESS_BYTES", 0)
    config = lines_config(tmp_path, workers=2)
    lines = (tmp_path / "lines.txt").read_bytes().splitlines(keepends=True)
    lines[200] = b"broken \xff\n"
    (tmp_path / "lines.txt").write_bytes(b"".join(lines))
    monkeypatch.setattr(prepare_text, "_spread", lambda sources, seed: iter(["a sample"]))  # it would meet the line first
    with pytest.raises(DataError, match=r"lines\.txt, line 201: not valid UTF-8"):
        prepare(config)


def test_mixtures_and_separate_validation(tmp_path: Path) -> None:
    for i in range(3):
        write_lines(tmp_path / f"{i}.txt", documents=50 + i, seed=i)
    sources = [{"kind": "text", "path": str(tmp_path / f"{i}.txt"), "document": "line"} for i in range(3)]
    prepared = prepare(config_for(tmp_path / "store", sources=sources[:2], validation={"sources": sources[2:]}))
    assert [s.n_documents for s in prepared.stores] == [50, 51]
    assert [s.n_documents for s in prepared.validation_stores] == [52]


def token_source(tmp_path: Path, ids: list[int]) -> dict[str, Any]:
    write_store(tmp_path / "corpus", [np.array(ids[i : i + 5]) for i in range(0, len(ids), 5)], dtype=dtype_for(70_000))
    return {"kind": "tokens", "path": str(tmp_path / "corpus")}


def test_a_megatron_corpus_is_used_where_it_is(tmp_path: Path) -> None:
    source = token_source(tmp_path, list(range(250)))
    for path in (source["path"], source["path"] + ".bin", source["path"] + ".idx"):
        prepared = prepare(config_for(tmp_path / "store", sources=[{**source, "path": path}]))
        assert prepared.stores[0].prefix == tmp_path / "corpus" and prepared.stores[0].n_documents == 50
    os.utime(bin_path(tmp_path / "corpus"), (1, 1))
    with pytest.raises(DataError, match="stale"):
        open_prepared(config_for(tmp_path / "store", sources=[source]))


def test_a_vocabulary_smaller_than_the_largest_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.bin: holds the id 257, but the tokenizer has 257 ids"):
        prepare(config_for(tmp_path / "store", sources=[token_source(tmp_path, [1, 2, 257, 3])]))


def test_a_damaged_megatron_corpus(tmp_path: Path) -> None:
    source = token_source(tmp_path, list(range(200)))
    raw = idx_path(tmp_path / "corpus").read_bytes()
    idx_path(tmp_path / "corpus").write_bytes(raw[:-3])
    with pytest.raises(DataError, match=r"corpus\.idx: .* truncated"):
        prepare(config_for(tmp_path / "store", sources=[source]))
    idx_path(tmp_path / "corpus").unlink()
    named = r"^data\.sources\.0\.path=.*corpus: there is no corpus\.idx; .*; nearest: .*corpus\.bin; ask us$"
    with pytest.raises(DataError, match=named):
        prepare(config_for(tmp_path / "store", sources=[{**source, "hint": "ask us"}]))


def test_a_bpe_cannot_learn_from_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="learns from text, and no source has any"):
        prepare(config_for(tmp_path / "store", sources=[token_source(tmp_path, [1, 2])], tokenizer={"kind": "bpe"}))


def test_no_document_at_all(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with pytest.raises(DataError, match=r"blank\.txt: there is no text"):
        prepare(config_for(tmp_path / "s", sources=[{"kind": "text", "path": str(tmp_path / "blank.txt"), "document": "line"}]))


def test_the_slow_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    expected = store_bytes(lines_config(tmp_path, store="expected", tokenizer={"kind": "bpe", "vocab_size": 300}))
    monkeypatch.setattr(prepare_text, "agrees_on", lambda encoder, folder, texts: False)
    made = store_bytes(lines_config(tmp_path, tokenizer={"kind": "bpe", "vocab_size": 300}))
    assert "several times slower than the fast way: tiktoken gives other ids" in caplog.text
    assert made["train-000.bin"] == expected["train-000.bin"]
    assert json.loads(made["meta.json"])["tokenised_by"] == "tokenizers"


def test_progress_is_lines_where_there_is_no_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    prepare(lines_config(tmp_path), progress=True)
    assert "tokenising: done in" in caplog.text
    caplog.clear()
    prepare(lines_config(tmp_path, store="quiet"), progress=False)
    assert "tokenising" not in caplog.text
