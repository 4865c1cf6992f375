"""The run folder: one run and no other lives in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.config.errors import CheckpointError, ConfigError, DataError
from distllm.config.load import from_yaml, to_yaml, what_changed
from distllm.config.places import make_folder
from distllm.config.schema import Config

CONFIG_FILE = "config.yaml"
LABELS = "labels.json"


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps everything."""

    path: Path
    begun: bool
    """Whether an earlier attempt of the same run took steps here."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer, kept so that the run can be used without its token store."""
        return self.path / "tokenizer"

    @property
    def samples(self) -> Path:
        """The file of the texts that the model writes on the way, each after a line `--- step N, prompt ...`."""
        return self.path / "samples.txt"

    @property
    def run_id(self) -> Path:
        """The file with the id of the W&B run, for a start that has no checkpoint yet to read it from."""
        return self.path / "wandb_id"


def claim(config: Config) -> RunFolder:
    """Make the run's folder, or enter it again if it holds this very run. For rank 0.

    Args:
        config: resolved; `out`, `name` and `resume` are read.

    Returns:
        The folder, with the resolved config saved in it.

    Raises:
        ConfigError: the folder holds another run, or `resume: never` meets a run.
        OSError: it cannot be written.
    """
    path = Path(config.out) / config.name
    saved = path / CONFIG_FILE
    begun = saved.exists() and _has_begun(path)
    if begun:
        if config.resume == "never":
            raise ConfigError(
                [f"resume=never: {path} already holds a run; use resume=auto to continue it, or another name=..."]
            )
        changed = _differences(saved, config)
        if changed:
            raise ConfigError(
                [
                    f"name={config.name}: {path} holds another run: it differs in {_several(changed)}; "
                    f"use another name=..., or the same values to continue it"
                ]
            )
    elif not saved.exists() and path.exists() and any(path.iterdir()):
        raise ConfigError([f"name={config.name}: {path} is not empty and holds no run; use another name=... or out=..."])
    make_folder(path, key="out", value=config.out, near="runs")
    temporary = path / f".{CONFIG_FILE}.tmp"
    temporary.write_text(to_yaml(config), encoding="utf-8")
    temporary.replace(saved)
    return RunFolder(path, begun)


def read_config(folder: Path) -> Config:
    """The resolved config of a run or checkpoint folder.

    Raises:
        CheckpointError: there is none, or it does not parse.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}, so this is not a run or a checkpoint of distllm")
    try:
        return from_yaml(file.read_text(encoding="utf-8"), where=str(file))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error.problems[0]}") from error


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and json have no common error class
        raise DataError(f"{folder}: no tokenizer can be loaded: {' '.join(str(error).split())[:200]}") from error


def _has_begun(path: Path) -> bool:
    """Whether a run took a step here; a start that failed before leaves nothing that a corrected one could harm."""
    figures = path / "metrics.jsonl"
    return (figures.exists() and figures.stat().st_size > 0) or any((path / "checkpoints").glob("step-*"))


def keep_tokenizer(folder: RunFolder, source: Path) -> None:
    """Copy the tokenizer into the run folder; a run that took steps keeps the one that it has."""
    if not (folder.begun and folder.tokenizer.exists()):
        _swap_in(folder.tokenizer, lambda partial: shutil.copytree(source, partial))


def keep_model_config(folder: RunFolder, hf_config: Any) -> None:
    """Write the transformers config into the run folder, so that the run can be used without the model that it began from."""
    _swap_in(folder.path / "model_config", lambda partial: hf_config.save_pretrained(partial))


def keep_labels(folder: RunFolder, labels: Mapping[str, Sequence[str]]) -> None:
    """Write down the label names of each task, by which predictions are told."""
    if labels:
        (folder.path / LABELS).write_text(json.dumps(labels, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_labels(folder: Path) -> dict[str, tuple[str, ...]]:
    """The label names of each task of a run; empty where its task has none."""
    file = folder / LABELS
    if not file.is_file():
        return {}
    return {name: tuple(names) for name, names in json.loads(file.read_text(encoding="utf-8")).items()}


def rewind_samples(folder: RunFolder, step: int) -> None:
    """Drop the texts that were written after `step`, before a resume takes those steps again."""
    if not folder.samples.exists():
        return
    text = folder.samples.read_bytes()
    later = (head.start() for head in re.finditer(rb"^--- step (\d+), prompt ", text, re.MULTILINE) if int(head[1]) > step)
    end = next(later, len(text))
    if end < len(text):
        os.truncate(folder.samples, end)


def keep_run_id(folder: RunFolder, run_id: str | None) -> None:
    """Write down the id of the W&B run, if there is one."""
    if run_id is not None:
        folder.run_id.write_text(run_id + "\n", encoding="utf-8")


def read_run_id(folder: RunFolder) -> str | None:
    """The id of the W&B run that an earlier attempt began."""
    return folder.run_id.read_text(encoding="utf-8").strip() if folder.begun and folder.run_id.exists() else None


def _swap_in(target: Path, write: Callable[[Path], object]) -> None:
    """Write a folder beside its place and put it there whole."""
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _differences(saved: Path, config: Config) -> list[str]:
    return what_changed(read_config(saved.parent), config)


def _several(lines: list[str]) -> str:
    shown = ", ".join(lines[:3])
    return shown if len(lines) <= 3 else f"{shown} and {len(lines) - 3} more"
