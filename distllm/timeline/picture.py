"""A pipeline's step as a picture: a row a rank, a box a piece of work, and what is left white is idle."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from distllm.timeline.simulate import Timeline

COLOURS = {"F": "#4c78a8", "B": "#f58518", "I": "#e45756", "W": "#54a24b"}
MEANING = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
MOST_NUMBERS = 2500
"""Boxes up to which each says its micro-batch."""


def draw_timeline(timeline: Timeline, path: Path, *, title: str) -> None:
    """Draw a step.

    Args:
        timeline: when each rank computes what.
        path: the PNG file.
        title: what it is; how much of it is idle is added.
    """
    ranks, length = len(timeline.ranks), timeline.length
    width = min(3.0 + 0.22 * length, 40.0)
    figure = Figure(figsize=(width, 1.6 + 0.45 * ranks), layout="constrained")
    axes = figure.subplots()
    inch = (width - 1.5) / length
    numbered = sum(map(len, timeline.ranks)) <= MOST_NUMBERS and inch > 0.1
    for rank, row in enumerate(timeline.ranks):
        stages = sorted({slot.work.stage for slot in row})
        for kind, colour in COLOURS.items():
            for stage in stages:  # later stages of a rank are paler
                boxes = [(s.begin, s.end - s.begin) for s in row if s.work.kind == kind and s.work.stage == stage]
                alpha = 1.0 - 0.55 * stages.index(stage) / max(1, len(stages) - 1)
                axes.broken_barh(boxes, (rank - 0.42, 0.84), facecolors=(colour, alpha), edgecolors="white", linewidth=0.4)
        for slot in row if numbered else ():
            dark = slot.work.stage == stages[0]
            middle = (slot.begin + slot.end) / 2
            size = min(8.0, 40 * inch)
            colour = "white" if dark else "black"
            axes.text(middle, rank, str(slot.work.microbatch), ha="center", va="center", fontsize=size, color=colour)
    for kind in sorted({slot.work.kind for row in timeline.ranks for slot in row}, key=list(COLOURS).index):
        axes.broken_barh([(0, 0)], (0, 0), facecolors=COLOURS[kind], label=MEANING[kind])
    axes.set_xlim(0, length)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_xlabel("slots: a forward pass of a stage is one")
    axes.set_title(f"{title}\n{idle_line(timeline)}", fontsize=10)
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130, facecolor="white")


def idle_line(timeline: Timeline) -> str:
    """How many slots are idle, and which share of all: '36 of 132 slots idle, 27.3 %'."""
    idle, every = sum(timeline.idle), timeline.length * len(timeline.ranks)
    return f"{idle:g} of {every:g} slots idle, {100 * timeline.share:.1f} %"
