"""Strict YAML: the core schema of YAML 1.2, no tags, no aliases, no key twice.

PyYAML speaks YAML 1.1, where `no` is false, `010` is eight, `1:30` is ninety and `1e-3` is text. Here they are what they
look like. Only the parser of PyYAML is used, never a constructor: nothing in a file can name a Python object.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from distllm.config.errors import ConfigError

LONGEST = 1_000_000  # bytes of a config; a longer file is something else
_RESOLVERS = [
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$|^0x[0-9a-fA-F]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
        ),
        list("-+0123456789."),
    ),
]


class _Reader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own class table)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConfigError([f"line {mark.line + 1}: aliases (*name) are not allowed; write the value out"])
        return super().compose_node(parent, index)


class _Writer(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(writer: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds odd line ends (U+0085) of unquoted and single-quoted text into spaces; double quotes escape them.
    style = None if text.replace("\n", "").isprintable() else '"'
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Writer.add_representer(str, _text)
for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(_tag, _pattern, _first)


def read(text: str, *, where: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the document.
        where: what to name in messages, such as the path of the file.

    Returns:
        Plain dicts (text keys), lists and scalars; None for an empty document.

    Raises:
        ConfigError: a syntax error, an alias, a tag, a key given twice or one that is not text; each with `where:line`.
    """
    try:
        node = yaml.compose(text, Loader=_Reader)
    except ConfigError as error:
        raise ConfigError([f"{where}:{p.removeprefix('line ')}" for p in error.problems]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        about = " ".join(part for part in (error.context, error.problem) if part).replace("\n", " ")
        place = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigError([f"{place}: not valid YAML: {about}"]) from None
    except yaml.YAMLError as error:  # a ReaderError: a character that YAML forbids
        position = getattr(error, "position", 0)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else 1
        raise ConfigError([f"{where}:{line}: not valid YAML: holds a character that is not text"]) from None
    except RecursionError:
        raise ConfigError([f"{where}: not valid YAML: nested too deeply"]) from None
    problems: list[str] = []
    value = _value(node, where, problems) if node is not None else None
    if problems:
        raise ConfigError(problems)
    return value


def write(value: Any) -> str:
    """The YAML text that `read` gives back as exactly `value`."""
    return str(yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120))


def _value(node: Any, where: str, problems: list[str]) -> Any:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_value(item, where, problems) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _mapping(node, where, problems)
    if isinstance(node, yaml.ScalarNode):
        try:
            return _scalar(node.tag.removeprefix("tag:yaml.org,2002:"), node.value)
        except KeyError:
            pass
        except ValueError:  # Python reads whole numbers of at most 4,300 digits
            problems.append(f"{where}:{line}: the number is too long")
            return None
    problems.append(f"{where}:{line}: the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not allowed; write a plain value")
    return None


def _mapping(node: Any, where: str, problems: list[str]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            text = f" {key_node.value!r}" if isinstance(key_node, yaml.ScalarNode) else ""
            problems.append(f"{where}:{line}: the key{text} must be text")
            continue
        if key_node.value in mapping:
            problems.append(f"{where}:{line}: the key {key_node.value!r} is given twice (first in line {lines[key_node.value]})")
            continue
        lines[key_node.value] = line
        mapping[key_node.value] = _value(value_node, where, problems)
    return mapping


def _scalar(tag: str, text: str) -> Any:
    if tag == "str":
        return text
    if tag == "null":
        return None
    if tag == "bool":
        return {"true": True, "false": False}[text.lower()]
    if tag == "int":
        return int(text, 16) if text.startswith("0x") else int(text.replace("_", ""))
    if tag == "float":
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise KeyError(tag)
