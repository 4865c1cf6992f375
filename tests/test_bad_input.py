"""Every bad input through the command line: one clear line, its exit code, no traceback, and nothing good is lost."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from distllm import cli
from distllm.checkpoint.find import check
from distllm.data.store import dtype_for, write_store
from tests.runs import losses, tiny_config

ROOT = Path(__file__).parents[1]
TEXT = ["data.sources.0.kind=text", "data.sources.0.document=line"]
TABLE = ["data.sources.0.document=file", "data.sources.0.kind="]


@dataclass(frozen=True)
class Told:
    """What a command said at its end."""

    code: int
    lines: list[str]
    """The lines of distllm's own on stderr, without its name."""
    err: str


def command(*argv: str, first: Callable[[], object] = lambda: None) -> Told:
    """Run a command line in a fork of this process, which has imported what takes seconds; `first` is called in it."""
    file = Path(f"{os.getpid()}.err")
    child = os.fork()
    if child == 0:
        code = 99
        try:
            sys.argv = ["distllm", *argv]
            for number, path in ((1, os.devnull), (2, str(file))):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            first()
            code = cli.run(list(argv))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    err = file.read_text()
    file.unlink()
    return Told(os.waitstatus_to_exitcode(status), *_split(err, debug="--debug" in argv))


def _split(err: str, *, debug: bool) -> tuple[list[str], str]:
    own = [line.removeprefix("distllm: ") for line in err.splitlines() if line.startswith("distllm: ")]
    log = [line for line in err.splitlines() if not line.startswith("distllm: ")]
    assert debug or all(re.match(r"\d\d:\d\d:\d\d ", line) for line in log), err
    return own, err


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder with its digest; work that was begun and not finished, and locks, are left out."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes at `folder`; False where mounting is not allowed, and then it is a plain folder."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def limit_files(size: int) -> Callable[[], object]:
    """Let no file grow beyond `size` bytes: a full disk for those who may not mount one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextmanager
def read_only(folder: Path) -> Iterator[Callable[[], object]]:
    """Make a folder read-only; what is given back is called in the command's process first."""
    bind = ["mount", "--bind", str(folder), str(folder)]
    if os.geteuid() == 0 and subprocess.run(bind, capture_output=True).returncode == 0:
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
            yield lambda: None
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    os.chmod(folder, 0o555)
    try:
        yield (lambda: os.setuid(65534)) if os.geteuid() == 0 else (lambda: None)
    finally:
        os.chmod(folder, 0o755)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "DISTLLM_INIT_METHOD"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def config(here: Path) -> Path:
    """The tiny config, its store prepared."""
    tiny_config(here)
    return here / "tiny.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run of 12 steps, checkpoints at 8 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_config(folder, "train.sample_tokens=0")
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = command("train", "tiny.yaml")
    finally:
        os.chdir(before)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def run(finished: Path, here: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished / "runs", here / "runs")
    return here / "runs" / "tiny"


# --- the config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["train.stpes=3"], "train.stpes=3: unknown key; nearest: train.steps"),
        (["train.steps=many"], "train.steps=many: must be a whole number above 0; nearest: 1000"),
        (["train.global_batch=7"], "train.global_batch=7: must be a multiple of micro_batch 2; nearest: 8"),
        (["model.sizes.vocab_size=100"], "model.sizes.vocab_size=100: must hold every id of the tokenizer; nearest: 256"),
    ],
)
def test_wrong_keys_types_and_combinations(argv: list[str], line: str, here: Path) -> None:
    tiny_config(here, prepared=False)
    for more in ([], ["--debug"]):
        done = command("train", "tiny.yaml", *argv, *more)
        assert (done.code, done.lines) == (2, [line])
        assert ("Traceback" in done.err) == bool(more)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content_", "line"),
    [
        (None, "wrong.yaml: no such config file; give a YAML file or a run folder"),
        (b"", "wrong.yaml: the file is empty; write at least one key, such as `name: my-run`"),
        (b"\x89PNG\xff\x00", "wrong.yaml: not a text file in UTF-8 (byte 0); this is no config"),
    ],
)
def test_config_files_that_are_none(content_: bytes | None, line: str) -> None:
    if content_ is not None:
        Path("wrong.yaml").write_bytes(content_)
    done = command("train", "wrong.yaml")
    assert (done.code, done.lines) == (2, [line])


# --- the data ------------------------------------------------------------------------------------------------------------

GOOD = b'{"text": "fine"}\n'
DATA = [
    ("missing", None, TEXT, r"^data\.sources\.0\.path=bad: no such file; nearest: the folder /\S+$"),
    ("no glob", None, [*TEXT, "data.sources.0.path=tinny.yaml*"], r"^data\.sources\.0\.path=tinny\.yaml\*: no file matches; nearest: tiny\.yaml$"),
    ("folder", None, [*TEXT, "data.sources.0.path=store"], r"^data\.sources\.0\.path=store: is a folder; nearest: a glob of its files, such as store/\*\*/\*$"),
    ("no pair", None, ["data.sources.0.kind=tokens", "data.sources.0.path=store/tiny", "data.sources.0.hint=make it", "data.sources.0.document=file"],
     r"^data\.sources\.0\.path=store/tiny: there is no tiny\.bin; a token store is a pair tiny\.bin and tiny\.idx; nearest: the folder store; make it$"),
    ("validation", None, [*TEXT, "data.sources.0.path=tiny.yaml", "data.validation.sources=[{kind: text, path: tiny.yml}]"],
     r"^data\.validation\.sources\.0\.path=tiny\.yml: no such file; nearest: tiny\.yaml$"),
    ("tokenizer", None, ["data.tokenizer.kind=hf", "data.tokenizer.path=./stroe", *TEXT, "data.sources.0.path=tiny.yaml"],
     r"^data\.tokenizer\.path=\./stroe: no such folder, .*; nearest: store$"),
    ("targets", None, ["data.sources.0.kind=parallel", "data.sources.0.path=tiny.yaml", "data.sources.0.target_path=tiny.yamml", "task.kind=translation_lm", "data.sources.0.document=file"],
     r"^data\.sources\.0\.target_path=tiny\.yamml: no such file; nearest: tiny\.yaml$"),
    ("empty", b"", TEXT, r"bad: the file is empty"),
    ("binary", b"ELF\x00\x01" * 90, TEXT, r"bad: a binary file \(NUL byte at byte 3\)"),
    ("UTF-8", b"fine\nfine\nna\xefve\n", TEXT, r"bad, line 3: not valid UTF-8"),
    ("JSONL", GOOD + b'{"text": \n', [*TABLE[:1], TABLE[1] + "jsonl"], r"bad, line 2: not valid JSON"),
    ("JSONL column", GOOD + b'{"body": "x"}\n', [*TABLE[:1], TABLE[1] + "jsonl"], r"bad, line 2: no column 'text'; the columns are body"),
    ("CSV column", b"body\nx\n", [*TABLE[:1], TABLE[1] + "csv"], r"bad.*column 'text'"),
]


@pytest.mark.parametrize(("bad", "overrides", "line"), [pytest.param(*case[1:], id=case[0]) for case in DATA])
def test_text_that_cannot_be_used(bad: bytes | None, overrides: list[str], line: str, config: Path) -> None:
    before = content(Path("store"))
    if bad is not None:
        Path("bad").write_bytes(bad)
    for more in ([], ["--debug"]) if bad is None else ([],):
        done = command("prepare", "tiny.yaml", "data.sources.0.path=bad", *overrides, *more)
        assert done.code == 3 and len(done.lines) == 1 and re.search(line, done.lines[0]), done.err
        assert ("Traceback" in done.err) == bool(more)
    assert content(Path("store")) == before and command("prepare", "tiny.yaml").code == 0


def test_a_text_shorter_than_one_sequence(config: Path) -> None:
    done = command("train", "tiny.yaml", "data.seq_len=100000")
    assert done.code == 3 and len(done.lines) == 1
    assert re.match(r"data\.seq_len=100000: .* the longest that works is data\.seq_len=\d+", done.lines[0])


def test_a_vocabulary_smaller_than_the_largest_id(config: Path) -> None:
    write_store(Path("theirs"), [np.array([1, 2, 300] * 50)], dtype=dtype_for(1000))
    tokens = ["data.sources.0.kind=tokens", "data.sources.0.path=theirs", "data.sources.0.document=file"]
    done = command("prepare", "tiny.yaml", *tokens)
    assert done.code == 3 and len(done.lines) == 1
    assert "theirs.bin: holds the id 300, but the tokenizer has 257 ids: it is not the one that made this store" in done.lines[0]


def test_a_tokenizer_that_does_not_match_the_store(config: Path) -> None:
    (file,) = Path("store").glob("*/tokenizer/tokenizer.json")
    good = file.read_bytes()
    file.write_bytes(good.replace(b'"id": 256', b'"id":  256'))
    done = command("train", "tiny.yaml")
    assert done.code == 3 and len(done.lines) == 1 and "not the tokenizer that made this store" in done.lines[0]
    file.write_bytes(good)
    assert command("prepare", "tiny.yaml").code == 0


# --- the disk ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_while_preparing(here: Path) -> None:
    tiny_config(here, prepared=False)
    with small_disk(here / "small", 64 << 10) as mounted:
        first = (lambda: None) if mounted else limit_files(10 << 10)
        done = command("prepare", "tiny.yaml", "data.store=small/store", first=first)
        assert done.code == 6 and len(done.lines) == 1, done.err
        assert re.search("the disk is full|too large for this file system", done.lines[0])
        assert not list(Path("small/store").glob("*/meta.json"))
    assert command("prepare", "tiny.yaml").code == 0


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(finished: Path, here: Path) -> None:
    tiny_config(here)
    one = sum(file.stat().st_size for file in (finished / "runs/tiny/checkpoints/step-12").iterdir())
    with small_disk(here / "small", int(1.75 * one)) as mounted:
        argv = ["train", "tiny.yaml", "out=small/runs", "train.sample_tokens=0"]
        if not mounted:
            assert command(*argv, "train.steps=4").code == 0
        first = (lambda: None) if mounted else limit_files(one // 2)
        done = command(*argv, first=first)
        assert done.code == 6 and len(done.lines) == 1 and "small/runs" in done.lines[0], done.err
        assert check(here / "small/runs/tiny/checkpoints/step-4").step == 4
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={20 * one}", str(here / "small")], check=True)
        done = command(*argv)
        assert done.code == 0 and "continuing at step 4" in done.err
        if mounted:  # else the first four steps had another schedule
            assert losses(here / "small/runs/tiny")[12] == losses(finished / "runs/tiny")[12]


def test_a_read_only_folder(run: Path, config: Path) -> None:
    before = content(run)
    with read_only(run.parent) as first:
        for argv in (["runs/tiny", "train.steps=14"], ["tiny.yaml", "name=new"]):
            done = command("train", *argv, first=first)
            assert done.code == 6 and len(done.lines) == 1 and re.search("read-only|no permission", done.lines[0]), done.err
    assert content(run) == before


# --- runs and checkpoints ------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_another_run(finished: Path, run: Path) -> None:
    before = content(run)
    done = command("train", str(finished / "tiny.yaml"), "out=runs", "optim.lr=0.02")
    assert done.code == 2 and len(done.lines) == 1
    assert "holds another run: it differs in optim.lr; use another name=..., or the same values to continue it" in done.lines[0]
    assert content(run) == before


def tear(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 7)


def tamper(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [tear, tamper])
def test_a_bad_checkpoint_is_named_and_the_one_before_it_used(harm: Callable[[Path], None], run: Path) -> None:
    file = run / "checkpoints/step-12/rank-00000.safetensors"
    harm(file)
    done = command("generate", str(file.parent.relative_to(Path.cwd())), "--prompt", "ab")
    assert done.code == 4 and len(done.lines) == 1 and file.name in done.lines[0]
    done = command("train", "runs/tiny", "train.steps=13")
    assert done.code == 0 and not done.lines
    assert done.err.count(file.name) == 1 and "continuing at step 8" in done.err
    assert check(run / "checkpoints/step-13").step == 13 and check(run / "checkpoints/step-12").step == 12


def test_no_good_checkpoint_at_all(run: Path) -> None:
    for file in run.glob("checkpoints/*/rank-00000.safetensors"):
        tear(file)
    done = command("generate", "runs/tiny", "--prompt", "ab")
    assert done.code == 4 and len(done.lines) == 1
    assert "none of its 2 checkpoints is good; the newest: " in done.lines[0] and "rank-00000.safetensors" in done.lines[0]


def test_two_ranks_tell_it_once(here: Path) -> None:
    tiny_config(here)
    argv = ["train", "tiny.yaml", "layout.dp_shard=2", "train.global_batch=8", "data.seq_len=100000"]
    done = subprocess.run(
        [sys.executable, "-m", "distllm", *argv], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines, _ = _split(done.stderr, debug=False)
    assert done.returncode == 3 and len(lines) == 1 and lines[0].startswith("data.seq_len=100000: "), done.stderr
