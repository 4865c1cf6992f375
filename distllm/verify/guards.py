"""Guards against vacuous success: a model that is dead agrees with itself under every layout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distllm.verify.judge import Verdict
from distllm.verify.trial import Trace

LEAST_NUMBERS = 1000
LEAST_TENSORS = 4


def dead(reference: Trace, other_seed: Trace) -> Iterator[str]:
    """What shows that a comparison with this reference would prove nothing, a line each.

    Args:
        reference: of the config's seed.
        other_seed: of the same case with another seed.
    """
    losses = np.array(reference.losses)
    if not np.isfinite(losses).all():
        yield "the loss of one process is not finite: there is nothing to compare"
        return
    if np.ptp(losses) <= 1e-9 * np.abs(losses).max():
        yield f"the loss does not move: it is {losses[0]:.6f} at every step"
    if len(reference.weights) < LEAST_TENSORS:
        yield f"the model has {len(reference.weights)} parameters; at least {LEAST_TENSORS} are to be compared"
    silent = [n for n in reference.gradients[0] if not any(np.any(g.get(n, 0.0)) for g in reference.gradients)]
    if not reference.gradients[0]:
        yield "no parameter has a gradient"
    if silent:
        yield f"the gradient is zero at every step: {', '.join(silent[:3])}"
    still = [n for n in reference.gradients[0] if np.array_equal(reference.weights[n], reference.starts[n])]
    if still:
        yield f"the weights do not move: {', '.join(still[:3])}"
    same = [n for n in reference.starts if np.array_equal(reference.starts[n], other_seed.starts[n])]
    if len(same) == len(reference.starts):
        yield "two seeds give the same initial weights"
    if other_seed.losses[0] == reference.losses[0]:
        yield "two seeds give the same loss"


def too_little(verdict: Verdict) -> Iterator[str]:
    """Whether too few numbers were compared to say anything."""
    if verdict.compared < LEAST_NUMBERS:
        yield f"only {verdict.compared} numbers were compared; at least {LEAST_NUMBERS} are to be"
