"""What is said of a key that is unknown and of a value that is wrong: the rule, and the nearest that works."""

from __future__ import annotations

import difflib
import json
from typing import Any

from distllm.config import yaml12
from distllm.config.errors import ConfigError
from distllm.config.kinds import ROOT, Kind, describe, field_of, kind_at, known_keys, looks_secret, nearest, shown
from distllm.config.schema import Config, Section


def wrong_value(key: str, value: Any) -> str:
    """The line that tells of a value that its key cannot have."""
    kind, field = kind_at(key), field_of(key)
    assert kind is not None and field is not None, key
    near = nearest(kind, value)
    if near is None and kind.what not in ("section", "table", "null"):
        is_whole_field = _last(key) in _siblings(key)
        near = field.get_default(call_default_factory=True) if is_whole_field else None
    text = _typeable(near, kind)
    given = json.dumps(value) if isinstance(value, str) and not isinstance(_plain_value(value), str) else shown(value)
    return f"{key}={given}: must be {describe(kind)}" + (f"; nearest: {text}" if text is not None else "")


def unknown_key(key: str, value: Any) -> str:
    """The line that tells of a key that there is not."""
    if looks_secret(key, value):
        return f"{key}: looks like a secret; keep it in the environment (such as WANDB_API_KEY) or in ~/.netrc, never in a config"
    keys = list(known_keys())
    parent = key.rpartition(".")[0]
    depth = key.count(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == parent and k.count(".") == depth]
    elsewhere = [k for k in keys if _last(k) == _last(key)]
    close = difflib.get_close_matches(key, siblings, n=1) or elsewhere or difflib.get_close_matches(key, keys, n=1)
    names = [_last(k) for k in siblings] or list(Config.model_fields)
    hint = f"nearest: {close[0]}" if close else f"known here: {', '.join(names)}"
    return f"{key}={shown(value)}: unknown key; {hint}"


def _plain_value(text: str) -> Any:
    """What YAML would read this text as without quotes."""
    try:
        return yaml12.read(text, where="value")
    except ConfigError:
        return text


def _siblings(key: str) -> set[str]:
    """The names of the fields of the section that holds `key`."""
    parent = kind_at(key.rpartition(".")[0]) if "." in key else ROOT
    return set(parent.section.model_fields) if parent is not None and parent.section is not None else set()


def _typeable(value: Any, kind: Kind) -> str | None:
    if value is None or isinstance(value, Section) or (isinstance(value, list) and any(isinstance(v, Section) for v in value)):
        return None
    if isinstance(value, str) and kind.what == "text" and _plain_value(value) != value:
        return json.dumps(value)  # in quotes, or YAML would read it as something else
    return shown(value)


def _last(key: str) -> str:
    return key.rpartition(".")[2]
