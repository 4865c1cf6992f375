"""What transformers calls a cache of keys and values: `past_key_values`, and from 5.24 on `cache`."""

from __future__ import annotations

import inspect

from torch import nn


def cache_name(model: nn.Module) -> str | None:
    """The argument of a model's forward, and the field of its outputs, that holds its cache; None where it has none."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in takes), None)
