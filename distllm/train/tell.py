"""What a measurement found: on the terminal, as a JSON file, and the confusion matrices as pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from distllm.metrics.classification import figures_by_class
from distllm.metrics.confusion_png import draw_confusion
from distllm.train.evaluate_source import Measured
from distllm.train.files import whole_file

MOST = 20
"""Classes up to which the whole confusion matrix is printed."""


def lines(found: Measured) -> Iterator[str]:
    """The figures, a line each, and for each task that classifies its classes and its confusion matrix."""
    width = max(16, 2 + max(map(len, found.figures), default=0))
    yield f"{'source':<{width}}{found.source}"
    for name, value in found.figures.items():
        whole = name.endswith(("tokens", "samples"))
        yield f"{name:<{width}}{value:,.0f}" if whole else f"{name:<{width}}{value:.4f}"
    for name, signature in found.signatures.items():
        yield f"{name:<{width}}{signature}"
    for task, confusion in found.confusions.items():
        labels = list(found.labels.get(task, ()))
        yield ""
        if task:
            yield f"{task}:"
        yield from _classes(confusion, labels)
        if len(labels) <= MOST:
            yield ""
            cells = [[label, *row] for label, row in zip(labels, confusion, strict=True)]
            yield from _table(["true \\ predicted", *labels], cells)


def _classes(confusion: np.ndarray, labels: Sequence[str]) -> Iterator[str]:
    rows = [
        [c.label, f"{c.precision:.4f}", f"{c.recall:.4f}", f"{c.f1:.4f}", c.support] for c in figures_by_class(confusion, labels)
    ]
    yield from _table(["class", "precision", "recall", "f1", "samples"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    every = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    for row in every:
        yield "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()


def draw(found: Measured, folder: Path, *, name: str) -> list[Path]:
    """Draw each confusion matrix as FOLDER/confusion-NAME.png; for one of several tasks NAME ends with -TASK."""
    paths = []
    for task, confusion in found.confusions.items():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (f"confusion-{name}-{task}.png" if task else f"confusion-{name}.png")
        draw_confusion(confusion, list(found.labels.get(task, ())), path, title=f"{task or name}")
        paths.append(path)
    return paths


def write_json(found: Measured, path: Path) -> None:
    """All figures as one JSON object; what is not a finite number is null."""
    figures = {name: value if math.isfinite(value) else None for name, value in found.figures.items()}
    confusions = {
        task: {"labels": list(found.labels.get(task, ())), "counts": counts.tolist()} for task, counts in found.confusions.items()
    }
    facts = {"source": found.source, **figures, "signatures": dict(found.signatures), "confusion": confusions}
    with whole_file(path) as file:
        file.write(json.dumps({k: v for k, v in facts.items() if v != {}}, indent=2, ensure_ascii=False) + "\n")
