"""Where metrics go: `metrics.jsonl` always, Weights & Biases when asked for."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distllm.config.errors import ConfigError
from distllm.config.schema import TrackConfig
from distllm.track.metrics import METRICS, MetricsFile

SUMMARY = "summary.json"
"""The file of a run folder that holds the run's last figures."""


class Tracker:
    """The metrics of one run. On ranks other than the main one every method does nothing."""

    run_id: str | None
    """The id of the W&B run, for the checkpoint, so that a resumed job continues the same run."""

    def __init__(
        self,
        folder: Path,
        *,
        config: TrackConfig,
        resolved: Mapping[str, Any],
        run_id: str | None,
        is_main: bool,
        log: logging.Logger | None = None,
    ) -> None:
        """Open the metrics file and, when asked for, the job's one W&B run.

        Args:
            folder: the run folder.
            config: the `track` section.
            resolved: the whole resolved config as plain values; secrets in it are struck out before W&B sees it.
            run_id: the id from the checkpoint, None for a new run.
            is_main: whether this is the one rank that tracks.
            log: where to say whether W&B is online or offline, and that it failed.

        Raises:
            ConfigError: W&B was asked for and is not installed; on every rank, so that none waits for another.
            OSError: the folder cannot be written.
        """
        if config.wandb and not _installed():
            raise ConfigError(
                ["track.wandb=true: the package wandb is not installed; pip install 'distllm[wandb]' or set it false"]
            )
        self.run_id = run_id
        self._folder = folder
        self._summary: dict[str, Any] = {}
        self._metrics: MetricsFile | None = None
        self._run: Any = None
        if not is_main:
            return
        self._metrics = MetricsFile(folder / METRICS)
        if config.wandb:
            from distllm.track.wandb_run import WandbRun

            self._run = WandbRun(folder, config=config, resolved=resolved, run_id=run_id, log=log)
            self.run_id = self._run.run_id

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the metrics of a step.

        Args:
            step: optimizer steps taken.
            values: plain numbers by name, never tensors that live on a device; a value of None is left out.

        Raises:
            OSError: the disk is full.
        """
        if self._metrics is not None:
            self._metrics.append(step, values)
        if self._run is not None:
            self._run.log(step, values)

    def rewind(self, step: int) -> int:
        """Forget what an earlier attempt wrote after `step`, before a resume takes those steps again.

        Args:
            step: the step of the checkpoint that the run continues from; 0 for a start from the beginning.

        Returns:
            How many lines of `metrics.jsonl` were dropped.
        """
        return 0 if self._metrics is None else self._metrics.rewind(step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record figures of the run as a whole, in `summary.json` and in W&B; a later value replaces an earlier one."""
        if self._metrics is None:
            return
        self._summary.update({name: value for name, value in values.items() if value is not None})
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in self._summary.items()}
        temporary = self._folder / f".{SUMMARY}.tmp"
        temporary.write_text(json.dumps(plain, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, self._folder / SUMMARY)
        if self._run is not None:
            self._run.summary(values)

    def finish(self, code: int = 0) -> None:
        """Close everything; a second call does nothing.

        Args:
            code: the exit code of the run; W&B shows a run that ends with another code than 0 as failed.
        """
        if self._metrics is not None:
            self._metrics.close()
        if self._run is not None:
            self._run.finish(code)
        self._metrics = self._run = None


def _installed() -> bool:
    """Whether the package is there; a working folder's own `wandb/`, full of old runs, has no `origin`."""
    try:
        found = importlib.util.find_spec("wandb")
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None
