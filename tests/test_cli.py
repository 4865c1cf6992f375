"""The command line: what is imported when, one line for each problem, told once, and the exit codes."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distllm import cli, launch
from distllm.config import errors
from distllm.config.load import to_yaml
from distllm.config.schema import Config

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "datasets", "wandb", "numpy", "tokenizers", "matplotlib", "accelerate", "deepspeed", "pyarrow"}
COMMANDS = ("prepare", "train", "bench", "launch", "jobs", "eval", "predict", "generate", "export", "explain", "report")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "DISTLLM_INIT_METHOD"):
        monkeypatch.delenv(name, raising=False)
    Path("run.yaml").write_text("name: a\ndevice: cpu\n")
    return tmp_path


def child(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distllm", *argv], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, timeout=60,
    )  # fmt: skip


def imported(*argv: str) -> list[str]:
    """The modules that a command has imported when it ends."""
    code = f"import sys; from distllm.cli import run; run({list(argv)!r}); print(file=sys.stderr); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
    return done.stderr.splitlines()[-1].split()


def packages(*argv: str) -> set[str]:
    """The top-level modules among them."""
    return {name.partition(".")[0] for name in imported(*argv)}


def fake_training(monkeypatch: pytest.MonkeyPatch, body: Callable[[Any], int]) -> None:
    """Put `body(config)` in the place of building and training."""
    build, loop = types.ModuleType("distllm.train.build"), types.ModuleType("distllm.train.loop")
    build.build = lambda config, world: config  # type: ignore[attr-defined]
    loop.train = body  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distllm.train.build", build)
    monkeypatch.setitem(sys.modules, "distllm.train.loop", loop)


def raising(error: BaseException) -> Callable[[Any], int]:
    def body(config: Any) -> int:
        raise error

    return body


def test_help_imports_nothing_heavy() -> None:
    assert not packages("--help") & (HEAVY | {"pydantic", "yaml"})
    assert not packages("train", "--help") & (HEAVY | {"yaml"})  # newer typers take pydantic themselves, for options


def test_config_errors_import_no_torch() -> None:
    for argv in (
        ("train", "run.yaml", "train.steps=-5"), ("train", "run.yaml", "layout.tp=2"), ("train", "none.yaml"),
        ("prepare", "run.yaml", "lr=3"), ("explain", "run.yaml", "train"), ("train", "run.yaml", "--print"),
        ("generate", "./nowhere"), ("eval", "runs/nowhere", "--text", "x"), ("predict", "./nowhere", "--input", "a", "--output", "b"),
        ("report", "nowhere"),
    ):  # fmt: skip
        assert not packages(*argv) & HEAVY, argv


def test_help_and_config_errors_import_little() -> None:
    """What they cost is what they import: about 330 modules are 0.13 s and 0.21 s (docs/benchmarks); torch alone is over 1,000."""
    for argv in (["--help"], ["train", "run.yaml", "train.stps=3"]):
        assert len(imported(*argv)) < 450, argv


def test_help_names_commands_and_exit_codes() -> None:
    out = " ".join(child("--help", COLUMNS="200").stdout.split())
    assert all(command in out for command in COMMANDS)
    documented = (ROOT / "docs" / "exit-codes.md").read_text()
    for name, code in vars(errors).items():
        if name.startswith("EXIT_"):
            assert re.search(rf"(: |· ){code} ", out) and f"| {code} |" in documented, name
    assert child().stdout == child("--help").stdout


def test_version() -> None:
    from distllm import __version__

    assert child("--version").stdout == f"distllm {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("train run.yaml train.steps=-5", "train.steps=-5: must be a whole number above 0; nearest: 1"),
        ("train run.yaml train.stps=5", "train.stps=5: unknown key; nearest: train.steps"),
        ("train run.yaml train.steps=abc", "train.steps=abc: must be a whole number above 0; nearest: 1000"),
        ("train run.yaml train.steps=20 schedule.warmup=100", "schedule.warmup=100: must be below train.steps=20; nearest: 19"),
        ("train run.yaml layout.cp_method=ulysses", "layout.cp_method=ulysses: says how layout.cp works, which is 1; nearest: ring"),
        ("prepare run.yaml data.sources.0.kind=text", "data.sources.0.path=null: kind text needs a path; nearest: data.sources.0.kind=embedded"),
        ("train run.yaml --processes 3 train.global_batch=16", "train.global_batch=16: must be a multiple of micro_batch 8 x data-parallel 3 = 24; nearest: 24"),
        ("train run.yaml layout.dp_replicate=2 --processes 3", "layout.dp_replicate=2: must divide the 3 processes; nearest: 1"),
        ("train rum.yaml", "rum.yaml: no such config file; nearest: run.yaml"),
        ("train train.steps=5", "train.steps=5: this is an override; the first argument is the config, a YAML file or a run folder"),
        ("train", "Missing argument 'CONFIG'; see distllm train --help"),
        ("train run.yaml --proceses 2", "No such option: --proceses; see distllm train --help"),
        ("trian run.yaml", "No such command 'trian'. Did you mean 'train'?; see distllm --help"),
        ("train run.yaml --processes 0", "--processes=0: must be a whole number of 1 or more; nearest: 1"),
        ("explain run.yaml stps", "stps: unknown key; nearest: train.steps"),
        ("explain", "CONFIG: must be given; nearest: distllm explain configs/quickstart.yaml"),
        ("eval run.yaml", "run.yaml: is a file; give a run, a checkpoint or a model folder"),
        ("generate . --device gpu", "--device=gpu: must be one of auto, cpu, cuda; nearest: auto"),
    ],
)  # fmt: skip
def test_a_wrong_command_or_config_is_one_line_and_2(argv: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(shlex.split(argv)) == errors.EXIT_CONFIG
    captured = capsys.readouterr()
    # The words in which typer names other options differ between its releases.
    told = re.sub(r"\s*\(?(Possible options|Did you mean --)[^;]*", "", captured.err)
    assert told == f"distllm: {line}\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("bench run.yaml --steps 0", "--steps=0: must be a whole number of 2 or more; nearest: 2"),
        ("bench run.yaml --rounds=x", "--rounds=x: must be a whole number of 1 or more; nearest: 6"),
        ("bench run.yaml --warmup 1.5", "--warmup=1.5: must be a whole number of 1 or more; nearest: 2"),
        ("verify run.yaml --timeout nan", "--timeout=nan: must be a number of 1 or more; nearest: 300"),
        ("launch run.yaml --lead 70000", "--lead=70000: must be a whole number from 1 to 65535; nearest: 65535"),
        ("launch run.yaml --command bench -- --steps 0", "--steps=0: must be a whole number of 2 or more; nearest: 2"),
        ("generate a --top-p 3", "--top-p=3: must be a number from 0 to 1; nearest: 1"),
        ("generate a --temperature -0.5", "--temperature=-0.5: must be a number of 0 or more; nearest: 0"),
        ("eval a --ensemble b --weight 2 --weight x", "--weight=x: must be a number; nearest: 1"),
        ("predict a --input a --output b --beams ''", "--beams='': must be a whole number of 1 or more; nearest: 1"),
    ],
)
def test_a_number_that_an_option_does_not_take(argv: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(shlex.split(argv)) == errors.EXIT_CONFIG
    assert capsys.readouterr().err == f"distllm: {line}\n"


def test_every_number_of_every_command_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    """By the help of each command: what it calls a number, its option refuses in our words where it is none."""
    count = 0
    for command in (*COMMANDS, "verify"):
        told = re.sub(r"\x1b\[[0-9;]*m", "", child(command, "--help", COLUMNS="200", TERM="dumb").stdout)
        for option in re.findall(r"(--[a-z-]+)\s+(?:INTEGER|FLOAT|<?(?:int|float))", told, re.IGNORECASE):
            assert cli.run([command, "run.yaml", f"{option}=x"]) == errors.EXIT_CONFIG
            assert re.fullmatch(rf"distllm: {option}=x: must be a (whole )?number.*; nearest: \S+\n", capsys.readouterr().err)
            count += 1
    assert count >= 30


def test_all_problems_are_told_each_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "run.yaml", "train.steps=-5", "lr=3", "seed=x"]) == 2
    assert [line.partition("=")[0] for line in capsys.readouterr().err.splitlines()] == ["distllm: lr", "distllm: seed", "distllm: train.steps"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that makes no folders")
@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("train out=/proc/nope", "out=/proc/nope: no folder can be made there; nearest: runs"),
        ("launch out=/proc/nope", "out=/proc/nope: no folder can be made there; nearest: runs"),
        ("launch out=/proc/nope layout.dp_shard=2", "out=/proc/nope: no folder can be made there; nearest: runs"),
        ("prepare data.store=/proc/nope", "data.store=/proc/nope: no folder can be made there; nearest: data_store"),
        ("verify --out /proc/nope/a", "--out=/proc/nope/a: no folder can be made there; nearest: runs/verify"),
        ("bench --out /proc/nope/a", "--out=/proc/nope/a: no folder can be made there; nearest: runs/bench"),
    ],
)
def test_a_folder_that_the_file_system_cannot_make_is_the_users(
    argv: str, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("t.txt").write_text("some text\n" * 50)
    small = ["model.sizes={hidden_size: 8, num_hidden_layers: 1, intermediate_size: 8, num_attention_heads: 1}", "data.seq_len=8",
             "data.sources=[{kind: text, path: t.txt}]", "data.tokenizer.kind=bytes", "data.workers=1"]  # fmt: skip
    command, *words = argv.split()
    assert cli.run([command, "run.yaml", *small, *words]) == errors.EXIT_CONFIG
    assert [told for told in capfd.readouterr().err.splitlines() if told.startswith("distllm: ")] == [f"distllm: {line}"]


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        ("generate ./nowhere", 4, "./nowhere: no such folder; give a run, a checkpoint or a model folder"),
        ("report nowhere", 4, "./nowhere: no such folder; give a run, a checkpoint or a model folder"),
        ("export runs/nowhere out", 4, "runs/nowhere: no such folder; give a run, a checkpoint or a model folder"),
        ("eval . --text ruhn.yaml", 3, "--text=ruhn.yaml: no such file; nearest: run.yaml"),
        ("eval . --data data.tsv --target ruhn.yaml", 3, "--data=data.tsv: no such file; nearest: the folder HERE"),
        ("predict . --output o --input .", 3, "--input=.: is a folder, and a file is needed; nearest: a file in it"),
    ],
)
def test_missing_inputs_are_told_at_once(argv: str, code: int, line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(shlex.split(argv)) == code
    assert capsys.readouterr().err.replace(str(here), "HERE") == f"distllm: {line}\n"


def test_a_missing_run_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/config.yaml").touch()
    assert cli.run(["generate", "runs/quikstart"]) == 4
    assert capsys.readouterr().err == "distllm: runs/quikstart: no such folder; nearest: runs/quickstart\n"


MEMORY = "out of memory; lower train.micro_batch or data.seq_len, set activation.mode=full, or spread the model with layout.dp_shard"
LOST = "lost the connection to another rank, which died or hangs; look at what the other ranks said; the same command continues from the last checkpoint"
UNREACHABLE = "the ranks did not find one another at MASTER_ADDR:MASTER_PORT (MASTER_ADDR:MASTER_PORT); check these two, the network, and that all WORLD_SIZE ranks were started"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.ConfigError(["a=1: x", "b=2: y"]), 2, "a=1: x\ndistllm: b=2: y"),
        (errors.DataError("f.jsonl:3: not JSON"), 3, "f.jsonl:3: not JSON"),
        (errors.CheckpointError("step-5: torn"), 4, "step-5: torn"),
        (errors.DivergedError("10 steps"), 5, "10 steps"),
        (errors.StorageError("out: full"), 6, "out: full"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/x"), 6, "runs/a/x: the disk is full; free some space, or choose another folder with out=... or data.store=..."),
        (OSError(errno.EROFS, "Read-only file system", "runs/a"), 6, "runs/a: the file system is read-only; free some space, or choose another folder with out=... or data.store=..."),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 6, "a/b: is below a file, and needs a folder; free some space, or choose another folder with out=... or data.store=..."),
        (FileExistsError(errno.EEXIST, "File exists", "a"), 6, "a: is a file, and a folder is needed; free some space, or choose another folder with out=... or data.store=..."),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 6, "runs: no permission; free some space, or choose another folder with out=... or data.store=..."),
        (MemoryError(), 8, MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 8, MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:131] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"), 8, MEMORY),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:17521"), 7, LOST),
        (RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation to complete"), 7, LOST),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited or there was a network error"), 7, LOST),
        (dist.DistStoreError("Timed out after 121 seconds waiting for clients. 1/2 clients joined."), 7, UNREACHABLE),
        (dist.DistNetworkError("The client socket has timed out after 1000ms while trying to connect to (10.0.0.1, 29500)."), 7, UNREACHABLE),
        (KeyError("x"), 1, "unexpected error: KeyError: 'x'; --debug shows the traceback. This is a fault of distllm: please report it"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_errors_of_a_run_have_their_codes(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_training(monkeypatch, raising(error))
    assert cli.run(["train", "run.yaml"]) == code
    assert capsys.readouterr().err == f"distllm: {line}\n"


def test_an_address_that_nobody_answers_at_is_told(here: Path) -> None:
    address = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29511", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}
    done = child("train", "run.yaml", "train.timeout_s=1", "layout.dp_shard=2", **address)
    told = [line for line in done.stderr.splitlines() if line.startswith("distllm: ")]
    assert done.returncode == 7 and "Traceback" not in done.stderr
    assert told == ["distllm: " + UNREACHABLE.replace("MASTER_ADDR:MASTER_PORT (", "no-such-host.invalid:29511 (")]


def test_what_the_data_says_on_its_way_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.txt").write_text("some text\n" * 50)
    argv = ["prepare", "run.yaml", "data.sources.0.kind=text", "data.sources.0.path=t.txt", "data.tokenizer.kind=bytes", "data.workers=1"]
    assert cli.run(argv) == 0
    assert "tokenising: done in " in capsys.readouterr().err
    Path("t.txt").write_text("other text\n" * 50)
    assert cli.run(argv) == 0 and cli.run(argv) == 0
    assert capsys.readouterr().err.count("the text of an earlier store has changed: preparing it again as data_store/") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_training(monkeypatch, raising(errors.DataError("bad")))
    monkeypatch.setattr(sys, "argv", ["distllm", "train", "run.yaml", "--debug"])
    assert cli.run(["train", "run.yaml", "--debug"]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err and err.count("distllm: bad\n") == 1
    assert cli.run(["train", "--debug", "run.yaml", "lr=3"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_code_of_the_loop_is_the_code_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (0, 75):
        fake_training(monkeypatch, lambda config, code=code: code)
        assert cli.run(["train", "run.yaml"]) == code


def test_overrides_and_run_folders_reach_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    fake_training(monkeypatch, lambda config: seen.append(config) or 0)
    folder = Path("runs/earlier")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(Config(name="earlier", seed=7)))
    assert cli.run(["train", "runs/earlier", "train.steps=200"]) == 0
    assert (seen[0].name, seen[0].seed, seen[0].train.steps) == ("earlier", 7, 200)


@pytest.mark.parametrize(
    ("argv", "count"), [("", 1), ("--processes 3", 3), ("layout.dp_replicate=2", 2), ("layout.dp_shard=2 layout.dp_replicate=2", 4)]
)
def test_print_shows_the_commands_and_runs_nothing(argv: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "run.yaml", *argv.split(), "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count
    assert all(f"-m distllm train run.yaml{' ' if '=' in argv else ''}" in line for line in lines)
    assert not Path("runs").exists()


def test_several_processes_go_to_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], int]] = []
    monkeypatch.setattr(launch, "local_ranks", lambda argv, count: calls.append((argv, count)) or 75)
    assert cli.run(["train", "run.yaml", "seed=2", "--processes", "2"]) == 75
    assert calls == [(["train", "run.yaml", "seed=2"], 2)]


@pytest.mark.parametrize(
    ("environment", "argv", "line"),
    [
        ({"WORLD_SIZE": "x"}, "", "WORLD_SIZE=x: must be a whole number above 0; nearest: unset WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "", "WORLD_SIZE=4: is set, but RANK is not; nearest: unset WORLD_SIZE, or start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "--processes 4", "--processes=4: a launcher has already started 2 (WORLD_SIZE); leave it out"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "lr=3", "lr=3: unknown key; nearest: optim.lr"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "lr=3", ""),
    ],
)  # fmt: skip
def test_a_rank_of_a_launcher(
    environment: dict[str, str], argv: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.run(["train", "run.yaml", *argv.split()]) == 2
    assert capsys.readouterr().err == (f"distllm: {line}\n" if line else "")


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fake_training(monkeypatch, lambda config: 0)
    assert cli.run(["train", "run.yaml", "device=cuda", "--processes", "1"]) == 2
    assert capsys.readouterr().err.startswith("distllm: device=cuda: ")


RANKS = """
import os, sys, types
rank = os.environ["RANK"]
def build(config, world):
    return world
def train(world):
    import torch.distributed as dist
    from distllm.config.errors import DataError
    if MODE == "same on all":
        raise DataError("f.txt: empty file")
    if MODE == "one rank" and rank == "1":
        raise DataError("f.txt: empty file")
    if MODE == "good":
        return 75
    dist.barrier()
for name, function in (("build", build), ("loop", train)):
    module = types.ModuleType("distllm.train." + name)
    setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
from distllm.cli import main
main()
"""


def test_a_rank_that_is_killed_is_told_once(here: Path) -> None:
    body = RANKS.replace("dist.barrier()", "os.kill(os.getpid(), 9) if rank == '1' else None; dist.barrier()")
    (here / "fake_ranks.py").write_text("MODE = 'killed'\n" + textwrap.dedent(body))
    driver = "import sys; from distllm.launch import local_ranks; sys.exit(local_ranks(['train', 'run.yaml'], 2, module='fake_ranks'))"
    paths = f"{here}{os.pathsep}{ROOT}"
    done = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 137 and "Traceback" not in done.stderr
    assert done.stderr.startswith("distllm: rank 1 ") and done.stderr.count("\n") == 1
    assert " was ended by SIGKILL (often: the machine is out of memory)" in done.stderr


@pytest.mark.parametrize(("mode", "code", "err"), [("same on all", 3, "distllm: f.txt: empty file\n"), ("one rank", 3, "distllm: f.txt: empty file\n"), ("good", 75, "")])
def test_real_ranks_tell_an_error_once(mode: str, code: int, err: str, here: Path) -> None:
    (here / "fake_ranks.py").write_text(f"MODE = {mode!r}\n" + textwrap.dedent(RANKS))
    driver = "import sys; from distllm.launch import local_ranks; sys.exit(local_ranks(['train', 'run.yaml'], 2, module='fake_ranks'))"
    paths = f"{here}{os.pathsep}{ROOT}"
    done = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": paths})
    assert (done.returncode, done.stderr) == (code, err)


def test_explain_draws_the_pipeline(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "explain run.yaml layout.pp=4 train.accumulation=8 --timeline step.png"
    assert cli.run(shlex.split(argv)) == 0
    assert "1f1b over 4 ranks, 8 micro-batches: 36 of 132 slots idle, 27.3 %\n" in capsys.readouterr().out
    assert (here / "step.png").stat().st_size > 5000
    assert cli.run(shlex.split("explain run.yaml --timeline step.png")) == errors.EXIT_CONFIG
    assert capsys.readouterr().err == "distllm: layout.pp=1: has no pipeline to draw to step.png; nearest: 2\n"


def test_a_closed_pipe_is_no_error() -> None:
    line = f"{shlex.quote(sys.executable)} -m distllm explain run.yaml | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stderr == "" and done.stdout.startswith("name ")
