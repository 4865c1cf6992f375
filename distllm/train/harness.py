"""lm-evaluation-harness on an exported model, where that package is installed."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from distllm.config.errors import ConfigError, DataError
from distllm.config.places import missing

INSTALL = "pip install 'distllm[harness]'"
_TASK = re.compile(r"^task:[ \t]*['\"]?([\w.-]+)", re.MULTILINE)


def run_harness(
    folder: Path, tasks: Sequence[str], *, kind: str, batch: int = 8, device: str = "cpu", limit: int | None = None
) -> dict[str, float]:
    """Measure a model folder on tasks of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    Args:
        folder: of transformers, with its tokenizer.
        tasks: names of its tasks, or paths of task files (.yaml) of one's own.
        kind: task.kind of the model.
        batch: requests at once.
        device: where to compute.
        limit: only this many documents of each task; None: all.

    Returns:
        Figures as TASK.METRIC.

    Raises:
        ConfigError: the package is not installed, there is no such task, or the model writes no text.
        DataError: a task cannot be run, such as one whose data cannot be fetched.
    """
    if kind not in ("causal_lm", "sft", "seq2seq"):
        raise ConfigError([f"--harness={','.join(tasks)}: is for models that write text, and this one is for {kind}"])
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError([f"--harness: the package lm_eval is not installed ({error}); {INSTALL}"]) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_task_name(Path(task)) if task.endswith((".yaml", ".yml")) else task for task in tasks]
    folders = [str(path.resolve().parent) for path in files]
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))  # its own take 4 s to list
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError([f"--harness={unknown[0]}: lm_eval has no such task; `lm_eval ls tasks` lists them"])
    # Its stop words look at one row a question, so with the beams of a generation_config.json it would stop by another's.
    written = {"num_beams": 1} if kind == "seq2seq" else None
    arguments: dict[str, str | int | float] = {
        "pretrained": str(folder), "backend": "seq2seq" if kind == "seq2seq" else "causal", "dtype": "float32",
    }  # fmt: skip
    try:
        found = simple_evaluate(
            model="hf", model_args=arguments, tasks=names, batch_size=batch, device=device, limit=limit, task_manager=manager,
            log_samples=False, bootstrap_iters=0, gen_kwargs=written,
        )  # fmt: skip
    except (OSError, ConnectionError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"--harness={','.join(names)}: {' '.join(str(error).split())[:200]}") from error
    assert found is not None, "this process has rank 0"
    return figures_of(found["results"])


def figures_of(results: Mapping[str, Mapping[str, object]]) -> dict[str, float]:
    """The numbers in the harness' results, TASK.METRIC; without standard errors, which it was not asked for."""
    return {
        f"{task}.{name.removesuffix(',none')}": float(value)
        for task, figures in results.items()
        for name, value in figures.items()
        if "," in name and isinstance(value, int | float) and "_stderr" not in name  # metric,filter; sizes have no comma
    }


def _task_name(file: Path) -> str:
    """The name of the task that a task file describes."""
    if not file.is_file():
        raise ConfigError([missing("--harness", file)])
    name = _TASK.search(file.read_text(encoding="utf-8"))
    if name is None:
        raise ConfigError([f"--harness={file}: names no `task:`"])
    return name[1]
