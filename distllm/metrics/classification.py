"""Accuracy, precision, recall and F1 from a confusion matrix.

Shapes: C classes; a confusion matrix [C, C] counts samples, rows by true class, columns by predicted class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distllm.config.metrics_table import AVERAGES


@dataclass(frozen=True)
class ClassFigures:
    """How one class fares."""

    label: str
    precision: float
    """Of the samples that were taken for this class, the share that is; 0 if there are none."""
    recall: float
    """Of the samples of this class, the share that was found; 0 if there are none."""
    f1: float
    support: int
    """Samples of this class."""


def classification_figures(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, and precision, recall and F1, each micro, macro and weighted by support.

    As in scikit-learn, a class that has neither samples nor predictions is left out of the macro average, and what
    would be 0 / 0 is 0.

    Args:
        confusion: counts [C, C], at least one of them above 0.
    """
    from sklearn.metrics import precision_recall_fscore_support  # a second to import

    true, predicted, count = _cells(confusion)
    figures = {"accuracy": float(count[true == predicted].sum() / count.sum())}
    for how in AVERAGES:
        values = precision_recall_fscore_support(true, predicted, sample_weight=count, average=how, zero_division=0.0)
        figures |= {f"{what}_{how}": float(v) for what, v in zip(("precision", "recall", "f1"), values, strict=False)}
    return figures


def figures_by_class(confusion: np.ndarray, labels: Sequence[str]) -> tuple[ClassFigures, ...]:
    """Precision, recall, F1 and support of every class, in the order of `labels`.

    Args:
        confusion: counts [C, C].
        labels: the names of the C classes.
    """
    from sklearn.metrics import precision_recall_fscore_support

    true, predicted, count = _cells(confusion)
    columns = precision_recall_fscore_support(
        true, predicted, sample_weight=count, labels=range(len(labels)), zero_division=0.0
    )
    rows = zip(labels, *columns, strict=True)
    return tuple(ClassFigures(label, float(p), float(r), float(f), round(n)) for label, p, r, f, n in rows)


def _cells(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True class, predicted class and count of the cells that are not empty: to scikit-learn, weighted samples."""
    true, predicted = np.nonzero(confusion)
    return true, predicted, np.asarray(confusion, dtype=np.float64)[true, predicted]
