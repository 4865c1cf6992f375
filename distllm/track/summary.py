"""What a run says at its end: what it reached, where everything is, and what to type next."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

SHARES = ("accuracy", "f1_macro")
"""Figures from 0 to 1 that are told in one line."""
FIRST = ("perplexity", "pearson", "bleu", "chrf")
"""Other figures that are."""


@dataclass(frozen=True)
class Summary:
    """The facts of the end of a run. What is None is not told."""

    run_folder: Path
    steps: int
    """Steps taken, those of earlier attempts included."""
    total_steps: int
    """Steps of the whole run."""
    seconds: float
    """Of training, those of earlier attempts included."""
    tokens: int
    """Input tokens trained on, those of earlier attempts included."""
    metrics: Path
    resume_command: str
    """What continues the run, or trains on."""
    val_loss: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    """Further validation figures by name."""
    unigram_loss: float | None = None
    """The validation loss of a model that knows only how frequent each token is."""
    best_metric: str | None = None
    """The figure by which the best evaluation was chosen."""
    best_value: float | None = None
    best_step: int | None = None
    best_of: tuple[int, int] | None = None
    """On how many validation samples the best was chosen, and how many there are."""
    tokens_per_s: float | None = None
    """The mean over `seconds`."""
    skipped: int = 0
    """Steps not taken because a loss or a gradient was not finite."""
    checkpoint: Path | None = None
    stopped: str | None = None
    """Why the run ended before its last step."""
    activate: str | None = None
    """What makes the command `distllm` known to the shell, where it is not."""
    writes: bool = True
    """Whether the model continues texts; else it predicts something of a text."""
    prompt: str = ""
    sample: str | None = None
    """Text that the model wrote after `prompt`."""
    own_code: bool = False
    """Whether the run's config runs code of its own, so that commands on its folder need `--trust`."""


def render_summary(summary: Summary, *, terminal: bool, width: int = 100) -> str:
    """The summary as text.

    Args:
        summary: the facts.
        terminal: with a frame and colours; else plain lines, for a pipe or a log file.
        width: columns of the terminal.

    Returns:
        Lines, the last with its end.
    """
    title = f"run {summary.run_folder.name}: " + (
        f"stopped at step {summary.steps:,} of {summary.total_steps:,} ({summary.stopped})"
        if summary.stopped
        else f"done, {summary.steps:,} steps"
    )
    sections = [_figures(summary), _places(summary), _next(summary)]
    if not terminal:
        blocks = ["\n".join(f"  {name:<17}{value}" for name, value in section) for section in sections]
        return "\n\n".join([title, *blocks, *_sample_lines(summary)]) + "\n"
    body = Text()
    for i, section in enumerate(sections):
        for name, value in section:
            body.append(f"{name:<17}", style="cyan")
            body.append(f"{value}\n", style="bold" if i == 0 else "")
        body.append("\n")
    for line in _sample_lines(summary):
        body.append(line + "\n\n", style="green")
    body.rstrip()
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=max(40, width), color_system="standard")
    console.print(Panel(body, title=Text(title), title_align="left", box=box.ROUNDED, padding=(1, 2)))
    return screen.getvalue()


def told(loss: float, figures: Mapping[str, float]) -> str:
    """A loss and the figures that people look at first, on one line: loss 1.2345, perplexity 3.44, accuracy 61.2 %.

    Of a multi_task run those of each task: mood.accuracy 61.2 %.
    """
    shown = [f"loss {loss:.4f}"]
    for name, value in figures.items():
        task, dot, figure = name.rpartition(".")
        words = f"{task}{dot}{figure.replace('_', ' ')}"
        if figure in SHARES:
            shown.append(f"{words} {value:.1%}")
        elif figure in FIRST:
            shown.append(f"{words} {value:,.2f}")
    return ", ".join(shown)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 7 h 12 min, 2 d 3 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name} {rest} {small_name}" if rest else f"{whole // size} {name}"
    raise AssertionError("at least a minute")


def printable(text: str) -> str:
    """Text without control characters: what a model writes must not steer the terminal that shows it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text).expandtabs(4)


def _figures(summary: Summary) -> list[tuple[str, str]]:
    speed = f", {summary.tokens_per_s:,.0f} tokens/s" if summary.tokens_per_s is not None else ""
    rows = [
        ("trained on", f"{summary.tokens:,} tokens"),
        ("time", f"{duration(summary.seconds)}{speed}"),
    ]
    if summary.val_loss is not None:
        rows.append(("validation", told(summary.val_loss, summary.figures)))
    if summary.unigram_loss is not None:
        rows.append(("unigram", f"loss {summary.unigram_loss:.4f}, a model that knows only how frequent each token is"))
    if summary.best_value is not None:
        at = f" at step {summary.best_step:,}" if summary.best_step is not None else ""
        what = (summary.best_metric or "val_loss").removeprefix("val_").replace("_", " ")
        part, every = summary.best_of or (0, 0)
        of = f", by {part:,} of {every:,} validation samples" if part < every else ""
        rows.append(("best", f"validation {what} {summary.best_value:.4f}{at}{of}"))
    if summary.skipped:
        rows.append(("skipped", f"{summary.skipped:,} steps with a loss or gradient that was not finite"))
    return rows


def _places(summary: Summary) -> list[tuple[str, str]]:
    rows = [("run folder", str(summary.run_folder)), ("metrics", str(summary.metrics))]
    return rows if summary.checkpoint is None else [*rows, ("checkpoint", str(summary.checkpoint))]


def _next(summary: Summary) -> list[tuple[str, str]]:
    run = shlex.quote(str(summary.run_folder))
    trust = " --trust" if summary.own_code else ""
    exported = shlex.quote(str(summary.run_folder / "export"))
    rows = [("curves", f"distllm report {run}")]
    if summary.checkpoint is not None:
        export = f"distllm export {run} {exported}{trust}"
        use = ("write text", f"distllm generate {run}{trust}")
        if not summary.writes:
            use = ("predict", f"distllm predict {run} --input FILE --output FILE{trust}")
        rows = [use, *rows, ("to transformers", export)]
    rows = [*rows, ("continue" if summary.stopped else "train on", summary.resume_command)]
    return rows if summary.activate is None else [("first", summary.activate), *rows]


def _sample_lines(summary: Summary) -> list[str]:
    if summary.sample is None:
        return []
    text = printable(summary.prompt + summary.sample).strip("\n")
    return ["sample\n" + "\n".join(f"  {line}" for line in text.split("\n"))]
