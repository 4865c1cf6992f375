"""The run folder: one run and no other lives in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.config.errors import CheckpointError, ConfigError, DataError
from distllm.config.load import from_yaml, to_yaml, what_changed
from distllm.config.schema import Config

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps everything."""

    path: Path
    continued: bool
    """Whether an earlier attempt of the same run was here."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"


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
    if saved.exists() and _has_begun(path):
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
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f".{CONFIG_FILE}.tmp"
    continued = saved.exists()
    temporary.write_text(to_yaml(config), encoding="utf-8")
    temporary.replace(saved)
    return RunFolder(path, continued)


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
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers, tokenizers and json have no common error class
        raise DataError(f"{folder}: no tokenizer can be loaded: {' '.join(str(error).split())[:200]}") from error


def _has_begun(path: Path) -> bool:
    """Whether a run took a step here; a start that failed before leaves nothing that a corrected one could harm."""
    figures = path / "metrics.jsonl"
    return (figures.exists() and figures.stat().st_size > 0) or any((path / "checkpoints").glob("step-*"))


def _differences(saved: Path, config: Config) -> list[str]:
    return what_changed(read_config(saved.parent), config)


def _several(lines: list[str]) -> str:
    shown = ", ".join(lines[:3])
    return shown if len(lines) <= 3 else f"{shown} and {len(lines) - 3} more"
