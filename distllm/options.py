"""The arguments and options that several commands have, and the checks of them that need nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distllm.config.errors import CheckpointError, ConfigError, DataError
from distllm.config.places import missing

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, or a run folder to go on with.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="Values in place of the file's: train.steps=100 optim.lr=1e-3"),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key] [key=value]...", help="Keys or sections, and overrides."),
]
Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A run, a checkpoint, or a Hugging Face folder or hub name."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run the Python code that the source names or brings with it.")]
Others = Annotated[
    list[str] | None,
    typer.Option(help="Another model that answers too: probabilities are averaged; may be given again."),
]
Weights = Annotated[list[float] | None, typer.Option(help="With --ensemble: a weight for each model, SOURCE's first.")]
Which = Annotated[
    str,
    typer.Option(help="The checkpoint of a run: auto (the newest), last (without averaged weights), best, ema or a step."),
]
Average = Annotated[int, typer.Option(min=1, help="The mean of the weights of a run's last checkpoints, this many.")]
Harness = Annotated[
    str | None,
    typer.Option(help="Tasks of lm-evaluation-harness, by name or as .yaml files, with commas between them."),
]
Beams = Annotated[int | None, typer.Option(min=1, help="The width of the beam search of translations; else the run's.")]
LengthPenalty = Annotated[float | None, typer.Option(min=0.0, help="Its length penalty; else the run's.")]
Column = Annotated[str | None, typer.Option(help="The column of the text; else as the run was trained.")]
PairColumn = Annotated[str | None, typer.Option(help="The column of the second text of a pair.")]
TaskName = Annotated[str, typer.Option(help="Of a model of several tasks: the one that is asked.")]
Truncate = Annotated[
    str | None,
    typer.Option(help="What becomes of longer texts: refuse, head, tail, middle, window; else as trained."),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Ranks to start here; else as the layout says, or one a GPU."),
]


def device_name(name: str) -> str:
    """The value of --device, if it is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError([f"--device={name}: must be one of auto, cpu, cuda; nearest: auto"])
    return name


def real_device(name: str) -> str:
    """The device that --device means on this machine."""
    if device_name(name) != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def must_be_file(path: Path, *, option: str) -> None:
    """Refuse a missing file before anything heavy is imported."""
    if path.is_dir():
        raise DataError(f"{option}={path}: is a folder, and a file is needed; nearest: a file in it")
    if not path.exists():
        raise DataError(missing(option, path))


def must_exist(source: str) -> None:
    """Refuse a missing folder before anything heavy is imported; `name` and `owner/name` may be models of the hub."""
    path = Path(source)
    if path.is_file():
        raise ConfigError([f"{source}: is a file; give a run, a checkpoint or a model folder"])
    is_hub_name = not path.is_absolute() and source.count("/") <= 1 and (path.parent == Path(".") or not path.parent.exists())
    if path.exists() or (is_hub_name and not source.startswith((".", "~", "runs/"))):
        return
    import difflib

    runs = [str(path.parent) for path in Path("runs").glob("*/config.yaml")]
    close = difflib.get_close_matches(source, runs, n=1, cutoff=0.3)
    hint = f"nearest: {close[0]}" if close else "give a run, a checkpoint or a model folder"
    raise CheckpointError(f"{source}: no such folder; {hint}")
