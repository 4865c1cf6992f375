"""What each key of the config may hold, read off the schema: for messages, typed overrides and the nearest legal value."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from distllm.config.schema import Config, Section
from distllm.config.secret import VALUE, names_secret


@dataclass(frozen=True)
class Kind:
    """What a place in the config may hold."""

    what: Literal["section", "whole", "number", "flag", "text", "choice", "null", "list", "pair", "table", "union"]
    section: type[Section] | None = None
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    pattern: str | None = None
    choices: tuple[str, ...] = ()
    parts: tuple[Kind, ...] = ()
    """The kinds of the elements of a list, pair or table, or the alternatives of a union."""


ROOT = Kind("section", section=Config)


def kind_of(annotation: Any, metadata: Sequence[Any] = ()) -> Kind:
    """The kind of a field with this type and these pydantic constraints."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for extra in arguments[1:] for m in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return kind_of(arguments[0], [*inner, *metadata])
    if origin in (Union, types.UnionType):
        return Kind("union", parts=tuple(kind_of(a) for a in arguments))
    if origin is Literal:
        return Kind("choice", choices=arguments)
    if origin is list:
        return Kind("list", parts=(kind_of(arguments[0]),))
    if origin is tuple:
        return Kind("pair", parts=tuple(kind_of(a) for a in arguments))
    if origin is dict:
        return Kind("table", parts=(kind_of(arguments[1]),))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return Kind("section", section=annotation)
    limits: dict[str, Any] = {}
    for constraint in metadata:
        for name, ours in (("gt", "above"), ("ge", "at_least"), ("le", "at_most"), ("lt", "below"), ("pattern", "pattern")):
            if getattr(constraint, name, None) is not None:
                limits[ours] = getattr(constraint, name)
    names: dict[Any, Any] = {int: "whole", float: "number", bool: "flag", str: "text", type(None): "null"}
    assert annotation in names, f"the schema uses a type that messages do not know: {annotation}"
    return Kind(names[annotation], **limits)


def child(kind: Kind, name: str) -> Kind | None:
    """The kind of the element `name` (a key, or an index in digits) inside `kind`; None where there is no such place."""
    if kind.what == "section":
        assert kind.section is not None
        field = kind.section.model_fields.get(name)
        return kind_of(field.annotation, field.metadata) if field else None
    if kind.what == "union":
        found = [inner for part in kind.parts if (inner := child(part, name)) is not None]
        return found[0] if found else None
    if kind.what == "table":
        return kind.parts[0]
    if kind.what == "list" and name.isdecimal():
        return kind.parts[0]
    if kind.what == "pair" and name.isdecimal() and int(name) < len(kind.parts):
        return kind.parts[int(name)]
    return None


def field_of(key: str) -> FieldInfo | None:
    """The schema's field for a dotted key; for an element of a list or table, the field that holds it."""
    kind: Kind | None = ROOT
    found: FieldInfo | None = None
    for part in key.split("."):
        if kind is None:
            return None
        if kind.what == "section" and kind.section is not None:
            if part not in kind.section.model_fields:
                return None
            found = kind.section.model_fields[part]
        kind = child(kind, part)
    return found


def kind_at(key: str) -> Kind | None:
    """The kind of a dotted key, or None for a key that the schema does not have."""
    kind: Kind | None = ROOT
    for part in key.split("."):
        kind = child(kind, part) if kind is not None else None
    return kind


def known_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the schema, sections and leaves; the first element stands for all elements of a list of sections."""
    for name, field in section.model_fields.items():
        kind = kind_of(field.annotation, field.metadata)
        yield prefix + name
        if kind.what == "section" and kind.section is not None:
            yield from known_keys(kind.section, f"{prefix}{name}.")
        if kind.what == "list" and kind.parts[0].section is not None:
            yield from known_keys(kind.parts[0].section, f"{prefix}{name}.0.")
        if kind.what == "table" and kind.parts[0].section is not None:
            yield from known_keys(kind.parts[0].section, f"{prefix}{name}.NAME.")


def describe(kind: Kind) -> str:
    """The rule for a value, to follow `must be`."""
    if kind.what in ("whole", "number"):
        noun = "a whole number" if kind.what == "whole" else "a number"
        if kind.at_least is not None and kind.at_most is not None:
            return f"{noun} from {_plain(kind.at_least)} to {_plain(kind.at_most)}"
        top = f" and below {_plain(kind.below)}" if kind.below is not None else ""
        top = top or (f" and at most {_plain(kind.at_most)}" if kind.at_most is not None else "")
        if kind.above is not None:
            return f"{noun} above {_plain(kind.above)}{top}"
        return f"{noun} of {_plain(kind.at_least)} or more{top}" if kind.at_least is not None else noun
    if kind.what == "choice":
        return f"one of {', '.join(kind.choices)}" if len(kind.choices) > 1 else kind.choices[0]
    if kind.what == "text" and kind.pattern is not None:
        return "1 to 100 letters, digits, dots, dashes and underscores, the first a letter or a digit"
    if kind.what == "union":
        return ", or ".join(describe(part) for part in kind.parts)
    if kind.what == "pair":
        return f"a list of {len(kind.parts)}, each {describe(kind.parts[0])}"
    if kind.what == "list":
        return f"a list, each {describe(kind.parts[0])}"
    if kind.what == "table":
        return f"a section of names, each {describe(kind.parts[0])}"
    return {"flag": "true or false", "text": "text", "null": "null", "section": "a section with keys of its own"}[kind.what]


def nearest(kind: Kind, value: Any) -> Any:
    """The legal value closest to a wrong `value`; None where nothing is close."""
    if kind.what == "union":
        return next((near for part in kind.parts if (near := nearest(part, value)) is not None), None)
    if kind.what in ("whole", "number"):
        return _nearest_number(kind, value)
    if kind.what == "choice":
        close = difflib.get_close_matches(str(value).lower(), kind.choices, n=1, cutoff=0.5)
        return close[0] if close else None
    if kind.what == "flag":
        words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
        return words.get(str(value).lower())
    if kind.what == "text" and kind.pattern is not None and isinstance(value, str | int | float):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).lstrip("._-")[:100]
        return name if re.match(kind.pattern, name) else None
    if kind.what == "text" and isinstance(value, int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if kind.what == "list" and isinstance(value, str) and kind.parts[0].what == "text":
        return [value]
    return None


def _nearest_number(kind: Kind, value: Any) -> float | int | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(value, bool) or number != number or abs(number) == float("inf"):
        return None
    whole = kind.what == "whole"
    if kind.above is not None and number <= kind.above:
        if not whole:
            return None  # no number is the nearest one above a limit
        number = kind.above + 1
    if kind.below is not None and number >= kind.below:
        return None
    number = max(number, kind.at_least) if kind.at_least is not None else number
    number = min(number, kind.at_most) if kind.at_most is not None else number
    if whole and kind.above is not None:
        number = max(number, kind.above + 1)
    return round(number) if whole else number


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def looks_secret(key: str, value: Any) -> bool:
    """Whether a key, or a text below it, looks like a password or an API key."""
    if isinstance(value, str) and VALUE.search(value):
        return True
    # By name only where the schema has no such key: `tokenizer` and `sample_tokens` are no secrets.
    return names_secret(key.rsplit(".", 1)[-1]) and value not in (None, "", {}, [])


def shown(value: Any) -> str:
    """A value as the user would type it, on one line, cut where long, hidden where it looks like a secret."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        text = "[" + ", ".join(shown(v) for v in value) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    elif looks_secret("", value):
        return "(hidden)"
    else:
        text = repr(value) if isinstance(value, str) and (not value or not value.isprintable()) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
