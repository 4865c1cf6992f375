"""The one W&B run of a job. The only file that imports wandb, and the only one that reads W&B's own environment.

W&B is a guest: without a key or a network it writes to the run folder, and when it fails the training goes on.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import math
import netrc
import os
import re
import secrets
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distllm.config.schema import TrackConfig
from distllm.config.secret import VALUE, may_name_secret

REACH_S = 5.0
"""Seconds in which the server must answer; else the run is offline."""

STRUCK = "***"

_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
"""The user:password of a URL."""


class WandbRun:
    """A W&B run, online where a key and a network are there, else offline in the run folder."""

    run_id: str | None

    def __init__(
        self,
        folder: Path,
        *,
        config: TrackConfig,
        resolved: Mapping[str, Any],
        run_id: str | None,
        log: logging.Logger | None,
    ) -> None:
        """Start the run, or continue the one with `run_id`; see `Tracker`."""
        self._log = log or logging.Logger("distllm.silent")
        mode, why = _mode()
        identity = run_id or secrets.token_hex(4)  # known before the first try, so that a second try is the same run
        self._run = None
        if mode == "online":
            try:
                self._run = _start(folder, config=config, resolved=resolved, run_id=identity, mode=mode)
            except Exception as error:  # whatever the server answered, training does not wait for it
                mode, why = "offline", f"the server refused: {_one_line(error)}"
                _end_service(1, wait_s=5.0)  # it still holds the id of the run that failed to start
        self.run_id = run_id if mode == "disabled" else identity
        self._next = 0
        if self._run is None:
            try:
                self._run = _start(folder, config=config, resolved=resolved, run_id=identity, mode=mode)
            except Exception as error:
                self._give_up(error)
                return
        # A resumed run's server already has the steps below; what is logged for them again would only bring warnings.
        self._next = int(self._run.step or 0)
        if mode == "offline":
            path = Path(self._run.dir).parent
            self._log.info(f"W&B: offline ({why}), run {self.run_id}; to upload it: wandb sync {path}")
        elif mode == "online":
            self._log.info(f"W&B: run {self.run_id}, {self._run.url}")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the metrics of a step; a step lower than the last is left out, as W&B would do with a warning."""
        if self._run is None or step < self._next:
            return
        self._next = step
        try:
            self._run.log({k: v for k, v in values.items() if v is not None}, step=step)
        except Exception as error:
            self._give_up(error)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record figures of the run as a whole."""
        if self._run is None:
            return
        try:
            self._run.summary.update({k: _jsonable(v) for k, v in values.items() if v is not None})
        except Exception as error:
            self._give_up(error)

    def finish(self, code: int) -> None:
        """Upload what is left, for a bounded time, and end the run."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=code)
        except Exception as error:
            self._give_up(error)
        self._run = None
        _end_service(code)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._log.warning(f"W&B stopped working and gets no more metrics (metrics.jsonl has all): {_one_line(error)}")


def scrub(value: Any, *, name: str = "") -> Any:
    """Strike out secrets in plain config values.

    A string is struck out when its key speaks of a secret (`api_key`, `hf.token`; not `tokenizer`, `sample_tokens` or
    `eos_token`). In any other string, what looks like a key of a known service and the password of a URL are.

    Args:
        value: dicts, lists, strings, numbers, nested.
        name: the key that the value stands under.

    Returns:
        A copy without secrets.
    """
    if isinstance(value, Mapping):
        return {str(key): scrub(item, name=str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item, name=name) for item in value]
    if not isinstance(value, str):
        return value
    return STRUCK if value and may_name_secret(name) else _struck(value)


def _struck(text: str) -> str:
    return _URL_LOGIN.sub(STRUCK, VALUE.sub(STRUCK, text))


def _start(folder: Path, *, config: TrackConfig, resolved: Mapping[str, Any], run_id: str, mode: str) -> Any:
    import wandb

    wanted = {
        "silent": True,
        "console": "off",
        "disable_git": True,  # a remote's URL may hold a token
        "disable_code": True,
        "save_code": False,
        "x_disable_meta": True,  # the command line, which may hold a token
        "x_disable_machine_info": True,
        "x_save_requirements": False,  # a package's URL may hold a token
        "init_timeout": 20.0,
        "finish_timeout": 30.0,
    }
    known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    return wandb.init(
        project=config.project,
        entity=config.entity,
        tags=scrub(config.tags) or None,
        name=folder.name,
        dir=str(folder),
        config=scrub(resolved),
        id=run_id,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        settings=wandb.Settings(**known),
    )


def _end_service(code: int, *, wait_s: float = 45.0) -> None:
    """Wait until W&B's helper process has written its files and ended: `finish` does not, and a rank leaves by `os._exit`.

    The wait is bounded, because the helper itself gives up uploading after `finish_timeout`; in a thread, to be sure.
    """
    import wandb

    def end() -> None:
        with contextlib.suppress(Exception):  # a helper that is dead already has nothing to write
            wandb.teardown(code)

    thread = threading.Thread(target=end, name="distllm-wandb-end", daemon=True)
    thread.start()
    thread.join(wait_s)


def _mode() -> tuple[str, str]:
    """online, offline or disabled, and why."""
    import wandb

    settings = wandb.setup().settings
    asked = (os.environ.get("WANDB_MODE") or settings.mode or "online").lower()
    if asked == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled", "asked for"
    if asked in ("offline", "dryrun"):
        return "offline", "asked for"
    base_url = os.environ.get("WANDB_BASE_URL") or settings.base_url
    if not _has_key(base_url):
        return "offline", "no API key in WANDB_API_KEY or netrc"
    if not _reachable(base_url):
        return "offline", f"{urlsplit(base_url).hostname} does not answer"
    return "online", ""


def _has_key(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    asked = os.environ.get("NETRC")
    for path in [Path(asked)] if asked else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(str(path)).authenticators(urlsplit(base_url).netloc):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _reachable(base_url: str) -> bool:
    """Whether the server answers at all, through a proxy where one is set; any answer will do.

    In a thread, because a name server that does not answer can hold a look-up far longer than any socket timeout.
    """
    opener = urllib.request.build_opener(_NoRedirect)
    answers: list[bool] = []

    def ask() -> None:
        try:
            opener.open(urllib.request.Request(base_url, method="HEAD"), timeout=REACH_S).close()
        except urllib.error.HTTPError as error:
            error.close()
            answers.append(True)
        except urllib.error.URLError as error:
            answers.append(isinstance(error.reason, ssl.SSLError))  # W&B brings certificates of its own
        except (OSError, ValueError, http.client.HTTPException):
            answers.append(False)
        else:
            answers.append(True)

    thread = threading.Thread(target=ask, name="distllm-reach", daemon=True)
    thread.start()
    thread.join(REACH_S + 1.0)
    return any(answers)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer too."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return _struck(text)[:300]
