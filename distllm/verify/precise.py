"""fp64 all the way: models cast to fp32 inside (norms, rotary angles, softmax, routers), and those casts go to fp64 here."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode


class InFp64(TorchFunctionMode):
    """While it is entered, torch.float32 means torch.float64 wherever a function of torch is asked for it.

    Without it a model that computes its norms in fp32 agrees with another layout to 1e-7, and a small fault is lost in that.
    The reference and every rank enter it alike.
    """

    def __enter__(self) -> Self:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: _wider(value) for name, value in (kwargs or {}).items()}
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm") and args[0].dtype == torch.float64:
            return _grouped_product(args[0], args[1], named["offs"])
        return func(*(_wider(value) for value in args), **named)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's grouped product, which has no fp64.

    Args:
        rows: [N, D], sorted by expert.
        weights: [E, D, H].
        ends: [E], where the rows of each expert end.

    Returns:
        [N, H].
    """
    stops = [int(end) for end in ends]
    starts = [0, *stops[:-1]]
    parts = [rows[a:b] @ weights[e] for e, (a, b) in enumerate(zip(starts, stops, strict=True))]
    return torch.cat([*parts, rows[stops[-1] :].new_zeros(len(rows) - stops[-1], weights.shape[-1])])
