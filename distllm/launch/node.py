"""The hand of `distllm launch --on ssh` on a node: it says what is here, waits for the word, and runs one launcher.

Started as `python -m distllm.launch.node` through ssh. The command, the environment with its secrets, and later requests
come as JSON lines on its input, so nothing of them is in a list of processes. When the input ends, in whatever way,
everything that was started here ends.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import threading
from pathlib import Path
from typing import Any

from distllm.launch.attempt import port_is_free
from distllm.launch.family import Request, run_family

PACKAGES = ("distllm", "torch", "transformers", "deepspeed", "accelerate")


def main() -> int:
    """Answer, wait for the job, run it; returns the launcher's exit code."""
    lines = iter(sys.stdin.readline, "")
    asked = _read(next(lines, ""))
    if asked is None:
        return 0
    print(json.dumps(answer(asked)), flush=True)
    job = _read(next(lines, ""))
    if job is None:  # another node did not answer, or has other versions
        return 0
    request = Request()
    threading.Thread(target=_listen, args=(lines, request), daemon=True, name="distllm-node").start()
    for path, text in job["files"].items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    with request.caught():
        return run_family(job["argv"], environment=os.environ | job["environment"], request=request)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked before anything starts: versions, whether the shared folder is the same, whether the port is free."""
    shared = Path(asked["shared"])
    try:
        seen = (shared / "token").read_text(encoding="utf-8") == asked["token"]
        (shared / f"seen-{asked['node']}").write_text(asked["token"], encoding="utf-8")
    except OSError:
        seen = False
    return {"versions": versions(), "seen": seen, "port": asked["port"] == 0 or port_is_free(asked["port"])}


def versions() -> dict[str, str]:
    """The versions of what the ranks must have alike; no package is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read(line: str) -> dict[str, Any] | None:
    value = json.loads(line) if line.strip() else None
    return value if isinstance(value, dict) and value.get("do") != "end" else None


def _listen(lines: Any, request: Request) -> None:
    """Take requests until the input ends; then nothing may be left here."""
    for line in lines:
        if line.strip() == '"stop"':
            request.stop.set()
    request.kill.set()


if __name__ == "__main__":
    sys.exit(main())
