"""fp64 that stays fp64: transformers' norms, softmaxes and routers go through fp32, which hides what layouts change."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class KeepWide(TorchFunctionMode):
    """Lets what would be cast from fp64 to fp32 stay as it is."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and first.dtype == torch.float64:
            if function is torch.Tensor.float:
                return first
            if function is torch.Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")):
                return first
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)
