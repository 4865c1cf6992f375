"""A confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

MOST_WORDS = 30
"""Classes up to which every cell says its count; beyond, colour alone does."""
LONGEST = 24
"""Characters of a label that are shown."""


def draw_confusion(confusion: np.ndarray, labels: Sequence[str], path: Path, *, title: str) -> None:
    """Draw counts, and by colour and number the share of each true class that was taken for each class.

    Args:
        confusion: counts [C, C], rows by true class, columns by predicted class.
        labels: the names of the C classes.
        path: the PNG file.
        title: what was measured.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1.0)
    classes, wordy = len(labels), len(labels) <= MOST_WORDS
    side = min(3.2 + 0.8 * classes, 20.0) if wordy else 12.0
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    names = [label if len(label) <= LONGEST else label[: LONGEST - 1] + "…" for label in labels]
    if wordy:
        axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 4 else 0)
        axes.set_yticks(range(classes), names)
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set_parse_math(False)  # a label is no formula, whatever its dollar signs
        for row, column in np.ndindex(classes, classes):
            words = f"{counts[row, column]:,.0f}\n{100 * shares[row, column]:.1f} %"
            dark = shares[row, column] > 0.5
            axes.text(column, row, words, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    right = counts.trace() / max(counts.sum(), 1.0)
    axes.set_title(f"{title}: {100 * right:.1f} % of {counts.sum():,.0f} right", parse_math=False)
    figure.savefig(path, dpi=130, facecolor="white")
