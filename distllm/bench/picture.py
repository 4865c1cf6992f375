"""Pictures of a bench: scaling over devices, and throughput against memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from distllm.bench.rows import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of Okabe and Ito
GREY = "#666666"


def draw(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw what the rows allow; without a measured cell, nothing.

    Args:
        folder: where `scaling.png` (if some cell is of more devices than another) and `memory.png` go.
        rows: with their scaling.
    """
    measured = [row for row in rows if row.figures is not None]
    paths = [_memory(folder / "memory.png", measured)] if measured else []
    if any(row.scaling is not None for row in measured):
        paths.insert(0, _scaling(folder / "scaling.png", rows))
    return paths


def _scaling(path: Path, rows: Sequence[Row]) -> Path:
    """Efficiency over devices, a line from each base to those that are compared with it; 1 is ideal."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in rows if row.scaling is not None]
    for number, row in enumerate(shown):
        assert row.scaling is not None and row.figures is not None
        base = rows[row.scaling.base].figures
        assert base is not None
        style = {"strong": "-o", "weak": "--s"}[row.scaling.kind]
        axes.plot(
            [base.devices, row.figures.devices], [1.0, row.scaling.efficiency], style, color=COLOURS[number % len(COLOURS)],
            linewidth=1.2, markersize=5, label=f"{row.cell.name} ({row.scaling.kind})",
        )  # fmt: skip
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    devices = sorted({row.figures.devices for row in rows if row.figures is not None})
    axes.set_xticks(devices, [str(count) for count in devices])
    axes.minorticks_off()
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("GPUs" if shown[0].figures and shown[0].figures.device != "CPU" else "CPU threads of all ranks")
    axes.set_ylabel("tokens/s and device, over the base's")
    axes.set_title("Scaling efficiency")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    return path


def _memory(path: Path, rows: Sequence[Row]) -> Path:
    """Tokens a second and device over the memory of the rank that takes most."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    ranks = sorted({row.cell.ranks for row in rows})
    for row in rows:
        figures = row.figures
        assert figures is not None
        colour = COLOURS[ranks.index(row.cell.ranks) % len(COLOURS)]
        x, y = figures.memory / 1e9, figures.tokens_per_s / figures.devices
        axes.scatter([x], [y], s=24, color=colour)
        axes.annotate(row.cell.name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6, color=GREY)
    for count in ranks:
        axes.scatter([], [], s=24, color=COLOURS[ranks.index(count) % len(COLOURS)], label=f"{count} ranks")
    axes.set_xlim(left=0.0)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("peak memory of a rank, GB")
    axes.set_ylabel("tokens/s and device")
    axes.set_title("Throughput against memory")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return path
