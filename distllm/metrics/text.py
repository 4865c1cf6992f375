"""Figures of texts: perplexity and bits per byte from a loss; BLEU and chrF from counts of n-grams that add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BLEU_COUNTS = 2 + 2 * 4
CHRF_COUNTS = 3 * 6


def perplexity(loss: float) -> float:
    """exp(loss in nats a token); infinity where that is no float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss_sum: float, text_bytes: int) -> float:
    """Bits that a byte of the text costs: the same unit for every tokenizer.

    Args:
        loss_sum: of -log p over all tokens of the text, in nats.
        text_bytes: the text's length in UTF-8.
    """
    return loss_sum / text_bytes / math.log(2.0)


def bleu_statistics(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What BLEU needs to know of these sentences; statistics of parts of a corpus add up to the corpus's.

    Args:
        hypotheses: what was written, plain text without tokenisation.
        references: what each should be.

    Returns:
        int64 [10]: words written, words of the references, matched n-grams and written n-grams for n = 1 to 4.
    """
    assert len(hypotheses) == len(references), "a reference for each hypothesis"
    if not hypotheses:
        return np.zeros(BLEU_COUNTS, dtype=np.int64)
    score = _bleu().corpus_score(hypotheses, [references])
    return np.array([score.sys_len, score.ref_len, *score.counts, *score.totals], dtype=np.int64)


def bleu_from(statistics: np.ndarray) -> tuple[float, str]:
    """BLEU (Papineni et al. 2002, https://aclanthology.org/P02-1040) as sacrebleu computes it, and sacrebleu's signature.

    Args:
        statistics: the sum of `bleu_statistics` over all sentences.

    Returns:
        The score, 0 to 100, and what it takes to compare it (Post 2018, arXiv 1804.08771).
    """
    counts = [round(float(c)) for c in statistics]
    metric = _bleu()
    score = metric.compute_bleu(counts[2:6], counts[6:], counts[0], counts[1], smooth_method=metric.smooth_method)
    return float(score.score), _signature(metric)


def chrf_statistics(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What chrF needs to know of these sentences; statistics of parts of a corpus add up to the corpus's.

    Args:
        hypotheses: what was written, plain text.
        references: what each should be.

    Returns:
        int64 [18]: for n = 1 to 6, the character n-grams written, those of the references, and those in both.
    """
    assert len(hypotheses) == len(references), "a reference for each hypothesis"
    rows = _chrf()._extract_corpus_statistics(hypotheses, [references])  # sacrebleu has no public name for them
    return np.array(rows, dtype=np.int64).reshape(-1, CHRF_COUNTS).sum(0)


def chrf_from(statistics: np.ndarray) -> tuple[float, str]:
    """chrF (Popović 2015, https://aclanthology.org/W15-3049) as sacrebleu computes it, and sacrebleu's signature.

    Args:
        statistics: the sum of `chrf_statistics` over all sentences.
    """
    metric = _chrf()
    score = metric._compute_score_from_stats([round(float(c)) for c in statistics])
    return float(score.score), _signature(metric)


def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(force=True)  # no warning for texts whose full stops stand apart


def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def _signature(metric: Any) -> str:
    """The metric's signature, which sacrebleu gives only after the metric has seen a reference."""
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())
