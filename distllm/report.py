"""The curves of a run as pictures, and its figures as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

from distllm.config.errors import DistllmError
from distllm.track.metrics import METRICS, read_metrics
from distllm.track.summary import duration
from distllm.track.tracker import SUMMARY

# The colours of Okabe and Ito, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"

Line = dict[str, Any]
Figures = dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Curve:
    """One metric in one panel."""

    name: str
    """Its name in `metrics.jsonl`."""
    label: str
    colour: str
    smooth: bool = False
    """Draw the values pale and their running mean over them."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    unit: str
    """The label of the y axis, with its unit."""
    curves: tuple[Curve, ...]
    scale: str = "plain"
    """plain, percent (of a share 0 to 1), si (k, M, G) or bytes."""
    from_zero: bool = False
    log_if_wide: bool = False
    """Use a logarithmic axis when a few values would press all the others flat."""


PICTURES: dict[str, tuple[Panel, ...]] = {
    "loss": (
        Panel(
            "Loss",
            "loss [nats / token]",
            (Curve("loss", "train", BLUE, smooth=True), Curve("val_loss", "validation", VERMILION)),
        ),
    ),
    "learning_rate": (Panel("Learning rate", "learning rate", (Curve("lr", "learning rate", BLUE),), from_zero=True),),
    "throughput": (
        Panel(
            "Throughput",
            "tokens / s",
            (Curve("tokens_per_s", "tokens / s", BLUE, smooth=True),),
            scale="si",
            from_zero=True,
        ),
        Panel(
            "Model FLOPs utilisation",
            "MFU [% of peak]",
            (Curve("mfu", "MFU", GREEN, smooth=True),),
            scale="percent",
            from_zero=True,
        ),
        Panel(
            "Waiting for data",
            "share of step time",
            (Curve("data_wait_share", "waiting", VERMILION, smooth=True),),
            scale="percent",
            from_zero=True,
        ),
    ),
    "memory": (
        Panel("Peak memory", "bytes", (Curve("peak_memory_bytes", "peak", BLUE),), scale="bytes", from_zero=True),
    ),
    "gradient_norm": (
        Panel(
            "Gradient norm, before clipping",
            "L2 norm",
            (Curve("grad_norm", "gradient norm", BLUE, smooth=True),),
            from_zero=True,
            log_if_wide=True,
        ),
    ),
}
"""File name without `.png` -> its panels, from top to bottom."""


def report(run_folder: Path) -> list[Path]:
    """Draw the curves of a run into RUN/report/, with a table beside them.

    A picture whose metrics the run does not have is left out.

    Args:
        run_folder: the folder that `distllm train` wrote; the run may still be going on.

    Returns:
        The files written: a PNG for each picture, then `summary.md`.

    Raises:
        DistllmError: the folder holds no run, or its metrics are empty or damaged; names the file and the line.
        OSError: the folder cannot be written.
    """
    if not run_folder.is_dir():
        raise DistllmError(f"{run_folder}: there is no such folder; give the folder of a run, such as runs/NAME")
    if not (run_folder / METRICS).is_file():
        raise DistllmError(f"{run_folder}: not a run, there is no {METRICS} in it; give the folder of a run")
    lines = read_metrics(run_folder / METRICS)
    figures = _figures(lines)
    facts = _facts(run_folder / SUMMARY, lines)
    folder = run_folder / "report"
    folder.mkdir(exist_ok=True)
    name = run_folder.resolve().name
    pictures = []
    for stem, panels in PICTURES.items():
        path = folder / f"{stem}.png"
        path.unlink(missing_ok=True)  # a picture of an earlier report must not pass for this one's
        shown = [panel for panel in panels if any(curve.name in figures for curve in panel.curves)]
        if shown:
            _draw(shown, figures, path, run=name, unigram=facts.get("unigram_loss"))
            pictures.append(path)
    table = folder / "summary.md"
    table.write_text(_table(name, figures, facts, pictures), encoding="utf-8")
    return [*pictures, table]


def _figures(lines: Sequence[Line]) -> Figures:
    """Each metric's steps and values. A step that an interrupted run wrote twice counts once, with its last value."""
    values: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                values.setdefault(name, {})[line["step"]] = float(value)
    return {name: (sorted(found), [found[step] for step in sorted(found)]) for name, found in values.items()}


def _facts(path: Path, lines: Sequence[Line]) -> Line:
    """Figures of the run as a whole, from the summary file where there is one, else from the metrics."""
    facts: Line = {}
    for line in lines:
        if "unigram_loss" in line:
            facts["unigram_loss"] = line["unigram_loss"]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}  # a run that is not over has none
    if isinstance(found, dict):
        facts.update(found)
    unigram = facts.get("unigram_loss")
    if not isinstance(unigram, (int, float)) or not math.isfinite(unigram):
        facts.pop("unigram_loss", None)
    return facts


def _draw(panels: Sequence[Panel], figures: Figures, path: Path, *, run: str, unigram: float | None) -> None:
    figure = Figure(figsize=(9.0, 4.8 if len(panels) == 1 else 1.0 + 2.6 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        drawn = sum(_curve(axes, curve, *figures[curve.name]) for curve in panel.curves if curve.name in figures)
        if any(curve.name == "val_loss" for curve in panel.curves) and unigram is not None:
            label = f"unigram baseline  {unigram:.4g}"
            axes.axhline(unigram, color=GREY, linestyle=(0, (6, 4)), linewidth=1.2, label=label)
            drawn += 1
        _dress(axes, panel, drawn)
    rows[0].set_title(f"{panels[0].title} · {run}", loc="left", fontsize=13, fontweight="bold")
    rows[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=130, facecolor="white")


def _curve(axes: Axes, curve: Curve, steps: list[int], values: list[float]) -> int:
    """Draw one metric; a value that is not finite is a gap, marked at the bottom. Returns the lines in the legend."""
    shown = [v if math.isfinite(v) else math.nan for v in values]
    lost = [step for step, v in zip(steps, values, strict=True) if not math.isfinite(v)]
    finite = [v for v in shown if not math.isnan(v)]
    if lost:
        axes.plot(lost, [0.02] * len(lost), "x", color="black", markersize=6, transform=axes.get_xaxis_transform(),
                  label=f"{curve.label}: not finite ({len(lost)})")  # fmt: skip
    if not finite:
        return bool(lost)
    label = f"{curve.label}  {_short(finite[-1], curve)}"
    few = len(finite) <= 40
    marker = {"marker": "o", "markersize": 4 if few else 0}
    if curve.smooth and not few:
        axes.plot(steps, shown, color=curve.colour, linewidth=0.8, alpha=0.3)
        axes.plot(steps, _smooth(shown), color=curve.colour, linewidth=1.8, label=f"{label} (last; line: running mean)")
    else:
        axes.plot(steps, shown, color=curve.colour, linewidth=1.6, label=f"{label} (last)", **marker)  # type: ignore[arg-type]
    return 1 + bool(lost)


def _smooth(values: list[float]) -> list[float]:
    """The running mean of a window of about 1/40 of the curve, centred; gaps stay gaps and do not count."""
    value, count = np.array(values), len(values)
    known = ~np.isnan(value)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, value, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(count)
    reach = np.minimum(max(1, count // 80), np.minimum(at, count - 1 - at))  # as far to both sides: the ends do not lean
    low, high = at - reach, at + reach + 1
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(known, means, math.nan).tolist()


def _dress(axes: Axes, panel: Panel, drawn: int) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_ylabel(panel.unit)
    axes.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if panel.scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif panel.scale in ("si", "bytes"):
        axes.yaxis.set_major_formatter(EngFormatter(unit="B" if panel.scale == "bytes" else ""))
    if panel.log_if_wide and _wide(axes):
        axes.set_yscale("log")
    elif panel.from_zero:
        top = axes.get_ylim()[1]
        axes.set_ylim(0, top * 1.05 if top > 0 else 1)
    axes.margins(x=0.01)
    if drawn:
        axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)


def _wide(axes: Axes) -> bool:
    """Whether the largest value is far above the middle one, and all are positive."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines] or [np.zeros(1)])
    values = values[np.isfinite(values)]
    return bool(values.size and values.min() > 0 and values.max() > 30 * np.median(values))


def _short(value: float, curve: Curve) -> str:
    if curve.name in ("mfu", "data_wait_share"):
        return f"{value:.2%}"
    if curve.name == "peak_memory_bytes":
        return f"{value / 1e9:.2f} GB"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _table(run: str, figures: Figures, facts: Line, pictures: Sequence[Path]) -> str:
    """The report as Markdown: what was reached, each metric's last and extreme values, and the pictures."""
    last = max(steps[-1] for steps, _ in figures.values()) if figures else 0
    told = [("last step", f"{last:,}")]
    for name, label in (("tokens", "tokens"), ("samples", "samples")):
        if name in figures:
            told.append((label, f"{figures[name][1][-1]:,.0f}"))
    if "time_s" in figures:
        told.append(("time", duration(figures["time_s"][1][-1])))
    if "unigram_loss" in facts:
        told.append(("unigram baseline loss", f"{facts['unigram_loss']:.4f}"))
    skips = max((v for v in figures.get("skipped", ([], []))[1] if math.isfinite(v)), default=0)  # a running total
    if skips:
        told.append(("steps skipped (not finite)", f"{skips:,.0f}"))
    text = [f"# Run {run}", "", "| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in told)]
    text += ["", "| metric | last | lowest | at step | highest | at step |"]
    text += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, (steps, values) in figures.items():
        if name in ("tokens", "samples", "time_s", "skipped", "unigram_loss", "val_tokens"):
            continue
        pairs = [(v, s) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
        if not pairs:
            text.append(f"| {name} | not finite | | | | |")
            continue
        (low, low_step), (high, high_step) = min(pairs), max(pairs, key=lambda pair: (pair[0], -pair[1]))
        text.append(f"| {name} | {values[-1]:.6g} | {low:.6g} | {low_step:,} | {high:.6g} | {high_step:,} |")
    text += ["", *(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in pictures)]
    return "\n".join(text) + "\n"
