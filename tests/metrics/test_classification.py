"""Figures from a confusion matrix against scikit-learn on the samples themselves."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from distllm.config.metrics_table import AVERAGES
from distllm.metrics.classification import classification_figures, figures_by_class


def drawn(seed: int, *, classes: int, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True and predicted classes, and their confusion matrix."""
    rng = np.random.default_rng(seed)
    true, predicted = rng.integers(0, classes, samples), rng.integers(0, classes, samples)
    predicted = np.where(rng.random(samples) < 0.6, true, predicted)
    return true, predicted, sk.confusion_matrix(true, predicted, labels=range(classes))


@pytest.mark.parametrize(("seed", "classes", "samples"), [(0, 2, 50), (1, 5, 300), (2, 9, 8), (3, 4, 1)])
def test_equals_scikit_learn(seed: int, classes: int, samples: int) -> None:
    true, predicted, confusion = drawn(seed, classes=classes, samples=samples)
    found = classification_figures(confusion.astype(np.float64))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted), rel=1e-14)
    scores = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}
    for what, score in scores.items():
        for how in AVERAGES:
            expected = score(true, predicted, average=how, zero_division=0.0)
            assert found[f"{what}_{how}"] == pytest.approx(expected, rel=1e-14), (what, how)


def test_rows_are_the_true_classes() -> None:
    # Three samples of a, all found; of the two of b, one taken for a; c never appears.
    first, second, absent = figures_by_class(np.array([[3, 0, 0], [1, 1, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert (first.label, first.precision, first.recall, first.support) == ("a", 0.75, 1.0, 3)
    assert (second.label, second.precision, second.recall, second.support) == ("b", 1.0, 0.5, 2)
    assert (absent.precision, absent.recall, absent.f1, absent.support) == (0.0, 0.0, 0.0, 0)
