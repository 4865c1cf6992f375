"""Every command that the README and the pages under docs/ show runs, on shrunken configs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SHRINK = [
    "train.steps=2", "schedule.warmup=1", "train.micro_batch=2", "train.eval_batches=1", "train.sample_tokens=4",
    "train.eval_every=0", "data.tokenizer.train_bytes=200000", "data.tokenizer.vocab_size=300", "data.seq_len=32",
    "model.sizes.hidden_size=32", "model.sizes.intermediate_size=32", "model.sizes.num_hidden_layers=1",
    "model.sizes.num_attention_heads=2", "model.sizes.num_key_value_heads=1", "data.sources.0.kind=text",
    "data.sources.0.path=small.txt", "data.sources.0.document=paragraph", "data.validation.fraction=0.2",
]  # fmt: skip


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def shrunken(command: str) -> list[str]:
    """The command with a model and a text that take no time; what reads a run is left as it is."""
    words = shlex.split(command)
    if "distllm" in words and {"train", "launch", "prepare", "explain", "bench"} & set(words):
        words += [o for o in SHRINK if not any(w.startswith(o.split("=")[0] + "=") for w in words)]
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the configs, a README and a small text."""
    there = tmp_path_factory.mktemp("readme")
    (there / "configs").symlink_to(ROOT / "configs")
    (there / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    source = Path(os.__file__).read_text(encoding="utf-8")
    (there / "small.txt").write_text(source[:40_000], encoding="utf-8")
    return there


def test_make_targets_exist() -> None:
    wanted = [c for c in commands(ROOT / "README.md") if c.startswith("make ")]
    assert wanted == ["make quickstart", "make test"]
    for command in [*wanted, "make setup", "make lint", "make bench", "make test-gpu"]:
        done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr


@pytest.mark.timeout(300)
def test_every_command_of_the_readme_runs_in_order(folder: Path) -> None:
    shown = [c for c in commands(ROOT / "README.md") if not c.startswith("make ")]
    assert len(shown) >= 10
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for command in shown:
        done = subprocess.run(
            shrunken(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, command
    for name in ("quickstart", "sharded", "ddp"):
        assert (folder / "runs" / name / "checkpoints" / "step-2").is_dir()
    assert (folder / "exported" / "model.safetensors").is_file()


def test_the_errors_that_the_readme_shows_are_the_real_ones() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```text\n(\$ distllm.*?)```", text, flags=re.DOTALL)
    command, *lines = block.strip().splitlines()
    done = subprocess.run(
        [str(BIN / "distllm"), *shlex.split(command)[2:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == lines


def test_every_file_that_the_readme_points_to_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / target).exists(), target
