"""What a worker is made to do in a test; in a file of its own, because a worker imports the file."""

from __future__ import annotations

import os
import signal
from typing import Any


def killed(task: Any) -> None:
    """Die as a process dies that the system kills for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
