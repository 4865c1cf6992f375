"""The GPUs of this machine, counted without torch."""

from __future__ import annotations

import os
import re
from pathlib import Path


def has_driver() -> bool:
    """Whether there is a driver of GPUs at all (NVIDIA's, AMD's, that of Windows for Linux); else torch need not be asked."""
    return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def local_gpus() -> int:
    """How many GPUs a process here would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    if visible is not None:
        return min(present, len([part for part in visible.split(",") if part.strip()]))
    return present
