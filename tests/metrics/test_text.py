"""BLEU and chrF from added counts, against sacrebleu on the whole corpus."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics import BLEU, CHRF

from distllm.metrics.text import bits_per_byte, bleu_from, bleu_statistics, chrf_from, chrf_statistics, perplexity

HYPOTHESES = [
    "A man is riding a red bicycle .", "Two dogs play in the snow.", "", "a woman", "The children are running home!",
    "Zwei Männer – “quoted”", "x", "Some people sit at a table with food on it .",
]  # fmt: skip
REFERENCES = [
    "A man rides a red bicycle.", "Two dogs are playing in the snow.", "nothing", "A woman", "The children run home!",
    "Two men – “quoted”", "", "Some people sit at a table with food and drinks on it.",
]  # fmt: skip

Statistics = Callable[[Sequence[str], Sequence[str]], np.ndarray]
Score = Callable[[np.ndarray], tuple[float, str]]


@pytest.mark.parametrize(
    ("statistics", "score", "whole", "metric"),
    [
        (bleu_statistics, bleu_from, sacrebleu.corpus_bleu, BLEU()),
        (chrf_statistics, chrf_from, sacrebleu.corpus_chrf, CHRF()),
    ],
)
@pytest.mark.parametrize("cuts", [(), (3,), (0, 1, 5), (2, 2, 7)])
def test_parts_add_up_to_the_corpus(statistics: Statistics, score: Score, whole: Any, metric: Any, cuts: tuple[int, ...]) -> None:
    edges = [0, *cuts, len(HYPOTHESES)]
    pieces = [statistics(HYPOTHESES[a:b], REFERENCES[a:b]) for a, b in itertools.pairwise(edges)]
    found, signature = score(np.sum(pieces, axis=0).astype(np.float64))
    assert found == whole(HYPOTHESES, [REFERENCES]).score > 0.0
    metric.corpus_score(HYPOTHESES, [REFERENCES])
    assert signature == str(metric.get_signature())


def test_without_a_match_or_a_sentence_the_score_is_zero() -> None:
    assert bleu_from(bleu_statistics(["x y"], ["a b"]))[0] == 0.0
    assert bleu_from(bleu_statistics([], []))[0] == chrf_from(chrf_statistics([], []))[0] == 0.0


def test_a_smoothed_bleu_equals_sacrebleus() -> None:
    one, other = ["the cat sat down"], ["the cat lay down"]  # no 3-gram matches
    assert bleu_from(bleu_statistics(one, other))[0] == sacrebleu.corpus_bleu(one, [other]).score > 0.0


def test_perplexity_and_bits() -> None:
    assert perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert perplexity(1e6) == math.inf and math.isnan(perplexity(math.nan))
    assert bits_per_byte(10 * math.log(256.0), 10) == pytest.approx(8.0)
