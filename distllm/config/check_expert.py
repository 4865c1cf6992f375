"""What expert parallelism cannot be together with; plain arithmetic on sizes, so that a login node can check it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distllm.config.schema import MoeConfig

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""The names that families give the number of experts of a layer."""


def experts_in(sizes: Mapping[str, Any]) -> int | None:
    """The number of experts that the sizes of a model name; None where they name none.

    Args:
        sizes: `model.sizes`, or a transformers config as a dict.
    """
    counts = (sizes.get(name) for name in EXPERT_COUNTS)
    return next((count for count in counts if isinstance(count, int) and not isinstance(count, bool) and count > 0), None)


def expert_problems(experts: int | None, *, ep: int, tp: int = 1, family: str = "this model") -> Iterator[str]:
    """What is wrong with spreading experts over `ep` ranks.

    Args:
        experts: the experts of one layer; None for a model without any that can be spread.
        ep: expert-parallel ranks.
        tp: tensor-parallel ranks.
        family: what to call the model.

    Yields:
        A line for each problem, `key=value: rule; nearest: ...`.
    """
    if ep == 1:
        return
    if experts is None:
        yield f"layout.ep={ep}: {family} has no experts that can be spread; nearest: 1"
        return
    if experts % ep:
        near = min((d for d in range(1, experts + 1) if experts % d == 0), key=lambda d: (abs(d - ep), d))
        yield f"layout.ep={ep}: must divide the {experts} experts of a layer; nearest: {near}"
    # Experts that are both spread and cut would lie on a mesh of ep x tp, and every tp rank would send each row again.
    if tp > 1:
        yield f"layout.ep={ep}: experts are spread over ep or cut over tp, not both, and layout.tp={tp}; nearest: layout.tp=1"


def balance_problems(moe: MoeConfig, *, has_experts: bool, family: str = "this model") -> Iterator[str]:
    """What is wrong with asking for the losses of routers.

    Args:
        moe: the `moe` section.
        has_experts: whether the model has layers of experts that were found.
        family: what to call the model.
    """
    for key in ("balance", "z_loss"):
        if getattr(moe, key) and not has_experts:
            yield f"moe.{key}={getattr(moe, key)}: {family} has no experts to balance; nearest: 0"
