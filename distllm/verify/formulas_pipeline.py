"""What the stages of a pipeline send to one another: B S D e a boundary and micro-batch, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distllm.verify.ledger import Ledger, Step
from distllm.verify.local_shapes import Part, Stages, own_shape


def pipeline(step: Step, ledger: Ledger, parts: Sequence[Part], stages: Stages | None) -> None:
    """Hidden states and their gradients, the loss from the last stage, and the gradients of tied parameters.

    Boundaries between two stages of one rank, as in V schedules, send nothing. Source: Narayanan et al. 2021, arXiv 2104.04473.
    """
    if stages is None:
        return
    rank, last = step.place["pp"], len(stages.owners) - 1
    for micro in step.micro:
        hidden = micro.rows * (micro.tokens // step.sizes["cp"]) * stages.width * step.compute_bytes
        for part in parts:
            after, before = part.index + 1, part.index - 1
            for there in (after if after <= last else None, before if before >= 0 else None):
                if there is not None and stages.owners[there] != rank:
                    ledger.direct("pp", "send", hidden)
    ledger.ring(ledger.group("pp"), "broadcast", 2 * 8)  # [loss sum, count] in fp64
    ends = {stages.owners[0], stages.owners[-1]}
    if len(ends) == 2 and rank in ends:
        for name in stages.tied:
            parameter = step.model.get_parameter(name)
            if parameter.requires_grad:
                ledger.direct("pp", "send", math.prod(own_shape(step, name, parameter)) * step.master_bytes)
