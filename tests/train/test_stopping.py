from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from distllm.config.errors import ConfigError
from distllm.train.stopping import Best, figure_name, judge, minimised


def follow(values: list[float], *, metric: str = "loss", patience: int = 0, best: Best | None = None) -> list[str]:
    """What is decided at each of a row of evaluations: + improved, - not, ! stop."""
    best, told = best or Best(), []
    for step, value in enumerate(values):
        judgement = judge(best, {f"val_{metric}": value}, metric=metric, step=step, patience=patience)
        best = judgement.best
        told.append("+" if judgement.improved else "!" if judgement.stop else "-")
    return told


def test_less_loss_and_more_accuracy_are_better() -> None:
    assert follow([3.0, 2.0, 2.0, 2.5, 1.0]) == ["+", "+", "-", "-", "+"]
    assert follow([0.3, 0.2, 0.3, 0.4], metric="accuracy") == ["+", "-", "-", "+"]
    for name in ("val_loss", "perplexity", "val_bits_per_byte", "mse", "val_mae", "val_topic_loss", "val_topic/mse"):
        assert minimised(name), name
    for name in ("val_accuracy", "f1_macro", "bleu", "val_chrf", "pearson", "val_gloss", "val_lossless"):
        assert not minimised(name), name


def test_patience_counts_evaluations_in_a_row_and_an_improvement_begins_anew() -> None:
    assert follow([1.0, 2.0, 2.0, 0.5, 2.0, 2.0, 2.0], patience=3) == ["+", "-", "-", "+", "-", "-", "!"]
    assert follow([1.0] + [2.0] * 50, patience=0)[1:] == ["-"] * 50


def test_a_figure_that_is_not_finite_never_improves() -> None:
    assert follow([math.nan, 5.0, -math.inf, math.nan, math.inf], patience=3) == ["-", "+", "-", "-", "!"]
    assert follow([math.nan, math.nan], patience=2) == ["-", "!"]


def test_the_state_survives_a_checkpoint_and_a_change_of_the_metric_forgets_it() -> None:
    best = judge(Best(), {"val_loss": 2.0, "val_f1": 0.5}, metric="val_loss", step=7, patience=9).best
    best = judge(best, {"val_loss": 3.0}, metric="loss", step=8, patience=9).best
    again = Best(**json.loads(json.dumps(asdict(best))))
    assert again == best == Best("val_loss", 2.0, 7, 1)
    changed = judge(again, {"val_loss": 3.0, "val_f1": 0.4}, metric="f1", step=9, patience=9)
    assert changed.improved and changed.best == Best("val_f1", 0.4, 9, 0)


def test_a_metric_that_is_not_measured_is_one_line_with_those_that_are() -> None:
    with pytest.raises(ConfigError) as raised:
        judge(Best(), {"val_loss": 1.0, "val_f1_macro": 0.5}, metric="val_f1", step=1, patience=0)
    assert str(raised.value) == (
        "train.best_metric=val_f1: the evaluation has no such figure; it has val_f1_macro, val_loss; nearest: val_f1_macro"
    )
    assert figure_name("f1_macro", {"val_f1_macro": 0.5}) == "val_f1_macro"
