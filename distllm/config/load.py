"""Where a config comes from: a YAML file, `a.b=c` overrides, defaults; and what of it decides the result of a run."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distllm.config import yaml12
from distllm.config.errors import ConfigError
from distllm.config.kinds import (
    ROOT,
    Kind,
    child,
    describe,
    field_of,
    kind_at,
    looks_secret,
    shown,
)
from distllm.config.schema import Config, Section
from distllm.config.wrong import unknown_key, wrong_value

# What a run may change when it resumes, because the weights it computes do not follow from it (up to rounding). The batch
# is compared as one number, so that another layout may split it otherwise; `train.steps` may grow to train on.
_FREE_SECTIONS = {"name", "out", "resume", "device", "layout", "engine", "activation", "checkpoint", "track", "decode"}
_FREE_KEYS = {
    "model.attention", "model.trust_remote_code", "data.workers", "data.prefetch", "data.store", "optim.implementation",
    "task.metrics",
}  # fmt: skip
_BATCH_KEYS = {"train.global_batch", "train.micro_batch", "train.accumulation"}
_DECIDING_TRAIN_KEYS = _BATCH_KEYS | {
    "train.batch_tokens", "train.batch_ramp", "train.seq_ramp", "train.seq_ramp_from", "train.ema",
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A config, and for every leaf key where its value came from."""

    config: Config
    origins: dict[str, str]
    """Dotted key -> `default`, `file`, `command line`, `model` or `derived`."""


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a config file and apply overrides.

    Args:
        path: a YAML file, or a run folder, whose `config.yaml` is then read and continued.
        overrides: `a.b=c` texts, typed by the schema; a number in the key is an index into a list. The last one of a key wins.

    Returns:
        The config and the origin of every value. What several values cannot be together is for `check`.

    Raises:
        ConfigError: every problem at once, a line each.
    """
    run_folder = path if path.is_dir() else None
    raw = _read_file(path / "config.yaml" if run_folder else path)
    origins = {key: "file" for key in _flat(raw)}
    if run_folder is not None:
        # A run folder may have been moved, and naming it means to go on with it.
        absolute = run_folder.resolve()
        if (Path(str(raw.get("out", "runs"))) / str(raw.get("name", "run"))).resolve() != absolute:
            raw |= {"out": str(run_folder.parent), "name": absolute.name}
            origins |= {"out": "derived", "name": "derived"}
        if raw.get("resume", "auto") != "auto":
            raw["resume"], origins["resume"] = "auto", "derived"
    problems: list[str] = []
    for override in overrides:
        _override(raw, origins, override, problems)
    _take_the_models_tokenizer(raw, origins)
    config = _validate(raw, problems)
    return Loaded(config, _origins(config, origins))


def _take_the_models_tokenizer(raw: dict[str, Any], origins: dict[str, str]) -> None:
    """Unless the user names a tokenizer: a model that brings weights brings the tokenizer whose ids they know."""
    model, data = raw.get("model"), raw.setdefault("data", {})
    path = (model.get("path") or model.get("weights")) if isinstance(model, dict) else None
    if not isinstance(path, str) or not isinstance(data, dict) or data.get("tokenizer") is not None:
        return
    folder = Path(path).expanduser()
    for run in (folder, folder.parent.parent):  # a run, or RUN/checkpoints/step-N
        if (run / "tokenizer" / "tokenizer.json").is_file() and not (folder / "config.json").is_file():
            path = str(run / "tokenizer")
            break
    data["tokenizer"] = {"kind": "hf", "path": path}
    origins |= {"data.tokenizer.kind": "model", "data.tokenizer.path": "model"}


def to_yaml(config: Config) -> str:
    """The whole config as YAML, every value written out; `from_yaml` gives back an equal config."""
    return yaml12.write(config.model_dump(mode="json"))


def from_yaml(text: str, *, where: str = "config") -> Config:
    """Read what `to_yaml` wrote.

    Raises:
        ConfigError: the text is not such a config; messages name `where`.
    """
    return _validate(_as_mapping(yaml12.read(text, where=where), where), [])


def deciding(config: Config) -> dict[str, Any]:
    """The values, by dotted key, that decide which weights a run computes."""
    chosen: dict[str, Any] = {}
    for key, value in leaves(config):
        section = key.split(".", 1)[0]
        if section in _FREE_SECTIONS or key in _FREE_KEYS or key.endswith(".hint"):
            continue
        if section == "train" and key not in _DECIDING_TRAIN_KEYS:
            continue
        chosen[key] = value
    if config.train.global_batch is not None or config.train.batch_tokens is not None:
        del chosen["train.micro_batch"], chosen["train.accumulation"]
    return chosen


def digest(config: Config) -> str:
    """A sha256 (hex) over what decides the result of a run; equal for runs that may continue one another.

    The batch of a config without `train.global_batch` depends on the number of ranks: pin it first, with `check.resolved_config`.
    """
    text = json.dumps(deciding(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def what_changed(a: Config, b: Config) -> list[str]:
    """The keys that `digest` looks at and that differ between two configs, sorted."""
    old, new = deciding(a), deciding(b)
    absent = object()
    return sorted(key for key in old.keys() | new.keys() if old.get(key, absent) != new.get(key, absent))


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config with its dotted key, in the schema's order; lists of scalars are one value."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            for index, item in enumerate(value):
                yield from leaves(item, f"{prefix}{name}.{index}.")
        elif isinstance(value, dict) and value:
            for key, item in value.items():
                if isinstance(item, Section):
                    yield from leaves(item, f"{prefix}{name}.{key}.")
                else:
                    yield f"{prefix}{name}.{key}", item
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > yaml12.LONGEST:
            raise ConfigError([f"{path}: longer than {yaml12.LONGEST} bytes; this is no config"])
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError([_missing(path)]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not a text file in UTF-8 (byte {error.start}); this is no config"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    if not text.strip():
        raise ConfigError([f"{path}: the file is empty; write at least one key, such as `name: my-run`"])
    return _as_mapping(yaml12.read(text, where=str(path)), str(path))


def _missing(path: Path) -> str:
    if path.name == "config.yaml" and path.parent.is_dir():
        return f"{path.parent}: no config.yaml in this folder; give a YAML file or a run folder"
    if "=" in path.name and path.suffix not in (".yaml", ".yml"):
        return f"{path}: this is an override; the first argument is the config, a YAML file or a run folder"
    folders = dict.fromkeys([path.parent, Path("configs"), Path(".")])
    known = {file.stem: file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.y*ml"))}
    close = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
    hint = f"nearest: {known[close[0]]}" if close else "give a YAML file or a run folder"
    return f"{path}: no such config file; {hint}"


def _as_mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError([f"{where}: must hold keys with values (`name: my-run`), not {shown(value)}"])
    return value


def _override(raw: dict[str, Any], origins: dict[str, str], override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        problems.append(f"{shown(override)}: must look like key=value, such as train.steps=100")
        return
    kind = kind_at(key)
    if kind is None:
        problems.append(unknown_key(key, text))
        return
    try:
        value = _typed(kind, text)
    except ConfigError:
        problems.append(f"{key}={shown(text)}: must be {describe(kind)}, written as YAML")
        return
    rule = _place(raw, key.split("."), value)
    if rule is not None:
        problems.append(f"{key}={shown(value)}: {rule}")
        return
    for old in [k for k in origins if k == key or k.startswith(key + ".")]:
        del origins[old]
    origins[key] = "command line"
    origins |= {f"{key}.{inner}": "command line" for inner in _flat(value)}


def _typed(kind: Kind, text: str) -> Any:
    """What `text` on a command line means for a key of this kind: text stays as typed, the rest is YAML."""
    alternatives = kind.parts if kind.what == "union" else (kind,)
    if all(part.what in ("text", "choice", "null") for part in alternatives):
        if text in ("null", "~") and any(part.what == "null" for part in alternatives):
            return None
        if text[:1] not in ('"', "'"):
            return text
        quoted = yaml12.read(text, where="value")
        return quoted if isinstance(quoted, str) else text
    return yaml12.read(text, where="value")


def _place(raw: dict[str, Any], parts: list[str], value: Any) -> str | None:
    """Put `value` where `parts` lead inside `raw`; the rule it breaks if it cannot. Missing lists come from the defaults."""
    here: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            index = int(part)
            if index > len(here) or (index == len(here) and kind_at(".".join(parts[:depth])).what == "pair"):  # type: ignore[union-attr]
                noun = "element" if len(here) == 1 else "elements"
                return f"the list has {len(here)} {noun}; nearest: {'.'.join([*parts[:depth], str(len(here))])}"
            if index == len(here):
                here.append({})
            slot: Any = index
        elif isinstance(here, dict):
            slot = part
            if not last and here.get(part) is None:
                here[part] = _default(parts[: depth + 1])
        else:
            return f"{'.'.join(parts[:depth])} holds {shown(here)}, which has no keys"
        if last:
            here[slot] = value
        else:
            here = here[slot]
    return None


def _default(parts: list[str]) -> Any:
    """What to build on where the file says nothing: the default of a list, an empty section otherwise."""
    field, kind = field_of(".".join(parts)), kind_at(".".join(parts))
    if field is None or kind is None or kind.what not in ("list", "pair"):
        return [] if kind is not None and kind.what in ("list", "pair") else {}
    default = field.get_default(call_default_factory=True)
    return [item.model_dump(mode="json", exclude_unset=True) if isinstance(item, Section) else item for item in default or []]


def _validate(raw: dict[str, Any], problems: list[str]) -> Config:
    raw = _without_empty(raw, ROOT)
    for key, value in _flat(raw).items():
        if not f"{key}{value}".isascii() and any("\ud800" <= c <= "\udfff" for c in f"{key}{value}"):
            raise ConfigError([*problems, f"{shown(key)}={shown(value)}: must be UTF-8 text"])
    secrets = {key for key, value in _flat(raw).items() if looks_secret(key, value)}
    problems = [
        f"{key}: looks like a secret; keep it in the environment (such as WANDB_API_KEY) or in ~/.netrc, never in a config"
        for key in sorted(secrets)
    ] + [p for p in problems if not any(p.startswith(f"{key}=") for key in secrets)]
    model = raw.get("model")
    if isinstance(model, dict) and not {"type", "path", "spec"} & model.keys():
        raw = raw | {"model": {"type": Config().model.type} | model}
    config: Config | None = None
    try:
        # Strict JSON rules: no text for a number, no true for 1, but lists for tuples and whole numbers for floats.
        config = Config.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        seen = set(secrets)
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            if not detail["loc"]:
                problems.append(f"config: {detail['msg']}")
                continue
            key, value = _where(detail["loc"], raw, unknown=detail["type"] == "extra_forbidden")
            if key in seen:
                continue
            seen.add(key)
            problems.append(unknown_key(key, value) if detail["type"] == "extra_forbidden" else wrong_value(key, value))
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _without_empty(value: Any, kind: Kind | None) -> Any:
    """A section whose keys are all commented out is null in YAML, and means its defaults."""
    if kind is None or kind.what != "section" or not isinstance(value, dict):
        return value
    kinds = {key: child(kind, key) for key in value}
    empty = {key for key, inner in kinds.items() if inner is not None and inner.what == "section" and value[key] is None}
    return {key: _without_empty(item, kinds[key]) for key, item in value.items() if key not in empty}


def _where(location: Sequence[int | str], raw: Any, *, unknown: bool) -> tuple[str, Any]:
    """The key and value that pydantic's location means: it mixes the tags of union members into the path."""
    kind: Kind | None = ROOT
    parts: list[str] = []
    for part in location:
        inner = child(kind, str(part)) if kind is not None else None
        if inner is None and not (unknown and part == location[-1]):
            continue
        if isinstance(raw, list) and isinstance(part, int) and part >= len(raw):
            break  # a list that is too short: the list itself is wrong
        kind, raw = inner, raw[part]
        parts.append(str(part))
    return ".".join(parts), raw


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The values inside dicts and lists by dotted key; an empty one, or a scalar at the top, has none."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    flat: dict[str, Any] = {}
    for key, item in items:
        if isinstance(item, dict | list) and item:
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _origins(config: Config, given: dict[str, str]) -> dict[str, str]:
    origins: dict[str, str] = {}
    for key, _ in leaves(config):
        sources = {origin for k, origin in given.items() if k == key or k.startswith(key + ".")}
        order = ("command line", "derived", "model", "file")
        origins[key] = next((origin for origin in order if origin in sources), "default")
    return origins
