"""Whether a config runs Python code that is not distllm's: refused where the config came with somebody else's run."""

from __future__ import annotations

from distllm.config.errors import ConfigError
from distllm.config.kinds import shown
from distllm.config.schema import Config

OURS = "distllm.models."
"""Modules that come with distllm."""


def own_code(config: Config) -> str | None:
    """The key and value by which a config runs code of its own; None where it runs none."""
    if config.model.spec is not None and not config.model.spec.startswith(OURS):
        return f"model.spec={shown(config.model.spec)}"
    if config.model.trust_remote_code:
        return f"model.trust_remote_code=true with model.path={shown(config.model.path)}"
    return None


def refuse_own_code(config: Config, *, where: object) -> None:
    """Refuse a config, found at `where`, that runs code of its own.

    Raises:
        ConfigError: it does; says what would run.
    """
    code = own_code(config)
    if code is not None:
        raise ConfigError([f"{where}: its config runs code of its own ({code}); add --trust if you trust it"])
