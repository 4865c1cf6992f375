"""Every value of a config, where it came from and what it means; and the JSON schema for editors."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from distllm.config.check import Resolved, check, resolve_layout
from distllm.config.deepspeed_json import FileBuffers, deepspeed_json
from distllm.config.errors import ConfigError
from distllm.config.kinds import describe, field_of, kind_at, shown
from distllm.config.load import Loaded, leaves
from distllm.config.schema import Config

NARROW = 100  # columns of the aligned lines when stdout is no terminal


@dataclass(frozen=True)
class Row:
    """One value, explained."""

    key: str
    value: str
    origin: str
    doc: str


def rows(loaded: Loaded, key: str | None = None, *, ranks: int = 1) -> list[Row]:
    """The values at and below `key` (all without one), with what follows for `ranks` ranks written in place of `auto`.

    Raises:
        ConfigError: there is no such key; names the nearest.
    """
    derived = _derived(loaded.config, ranks)
    values = dict(leaves(loaded.config))
    found = [name for name in values if key is None or name == key or name.startswith(key + ".")]
    if not found and key is not None:
        known = list(dict.fromkeys([*values, *(name.rpartition(".")[0] for name in values if "." in name)]))
        same_name = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        near = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"nearest: {near[0]}" if near else f"sections: {', '.join(Config.model_fields)}"
        raise ConfigError([f"{key}: unknown key; {hint}"])
    return [_row(name, values[name], loaded.origins.get(name, "default"), derived) for name in found]


def batch_line(resolved: Resolved) -> str:
    """The arithmetic of the batch, spelled out."""
    product = f"micro-batch {resolved.micro_batch} x accumulation {resolved.accumulation} x data-parallel {resolved.dp_size}"
    return f"global batch {resolved.global_batch} = {product}"


def summary(loaded: Loaded, *, ranks: int) -> list[str]:
    """Lines on what follows from the values: ranks, batch, tokens. Empty when the layout does not fit `ranks`."""
    try:
        resolved = resolve_layout(loaded.config, ranks)
    except ConfigError:
        return []  # the command tells the problems after the table
    steps, length = loaded.config.train.steps, loaded.config.data.seq_len
    step_tokens = resolved.global_batch * length
    lines = [batch_line(resolved), f"{step_tokens:,} tokens a step = global batch {resolved.global_batch} x {length} tokens"]
    lines.append(f"{step_tokens * steps:,} tokens in all = {step_tokens:,} x {steps:,} steps")
    if ranks > 1:
        sizes = resolved.sizes()
        lines.append(f"{ranks} ranks = " + " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1))
        reads = ["dp_replicate", "dp_shard", *(["ep"] if resolved.ep > 1 else [])]
        lines.append(f"data-parallel {resolved.dp_size} = " + " x ".join(f"{axis} {sizes[axis]}" for axis in reads))
    return lines


def show(loaded: Loaded, keys: list[str], *, ranks: int, terminal: bool) -> None:
    """Print the explanation: a table on a terminal, plain aligned lines otherwise.

    Args:
        loaded: the config and where it came from.
        keys: what to show, keys or sections; everything when empty. One single value is shown with its rule.
        ranks: the number of ranks to work the batch out for.
        terminal: whether stdout is one.
    """
    wanted: list[str | None] = [*keys] or [None]
    table = [row for key in wanted for row in rows(loaded, key, ranks=ranks)]
    if len(keys) == 1 and len(table) == 1 and table[0].key == keys[0]:
        print("\n".join(_single(table[0])))
    elif terminal:
        _rich(table)
    else:
        print("\n".join(_aligned(table)))
    if not keys or any(row.key.startswith("train.") and "batch" in row.key for row in table):
        lines = summary(loaded, ranks=ranks)
        print("\n".join(["", *lines]) if lines else "")


def json_schema() -> str:
    """The JSON schema of a config file, for editors: `# yaml-language-server: $schema=schema.json` in a file's first line."""
    schema = Config.model_json_schema()
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "distllm config"}
    # A section whose keys are all commented out is null, and means its defaults.
    for name, field in schema["properties"].items():
        if "$ref" in field:
            schema["properties"][name] = {"anyOf": [{"$ref": field.pop("$ref")}, {"type": "null"}], **field}
    return json.dumps(head | {k: v for k, v in schema.items() if k != "title"}, indent=2, ensure_ascii=False) + "\n"


def deepspeed(config: Config, *, ranks: int, buffers: Callable[[], FileBuffers]) -> str:
    """The JSON that DeepSpeed is given.

    Args:
        config: with engine.name=deepspeed.
        ranks: processes of the run.
        buffers: called with parameters in files: what the model needs for them.

    Raises:
        ConfigError: the config has a problem, or its engine is another one.
    """
    if problems := check(config, world_size=ranks):
        raise ConfigError(problems)
    needed = buffers() if config.engine.offload_parameters == "nvme" else None
    return json.dumps(deepspeed_json(config, ranks=ranks, buffers=needed), indent=2)


def _derived(config: Config, ranks: int) -> dict[str, int]:
    """What `auto` and unset values come to."""
    try:
        resolved = resolve_layout(config, ranks)
    except ConfigError:
        return {}
    values = {
        "layout.dp_replicate": resolved.dp_replicate,
        "layout.dp_shard": resolved.dp_shard,
        "train.accumulation": resolved.accumulation,
        "train.global_batch": resolved.global_batch,
    }
    given = dict(leaves(config))
    return {key: value for key, value in values.items() if given[key] in ("auto", None)}


def _row(key: str, value: object, origin: str, derived: dict[str, int]) -> Row:
    field = field_of(key)
    kind = kind_at(key)
    rule = f"{describe(kind)[0].upper()}{describe(kind)[1:]}." if kind is not None else ""
    doc = " ".join((field.description or rule).split()) if field else ""
    if key in derived:
        return Row(key, f"{derived[key]}", f"derived ({shown(value)}, {origin})", doc)
    return Row(key, shown(value), origin, doc)


def _single(row: Row) -> list[str]:
    kind, field = kind_at(row.key), field_of(row.key)
    lines = [f"{row.key} = {row.value}", f"  from     {row.origin}"]
    if kind is not None:
        lines.append(f"  must be  {describe(kind)}")
    if field is not None and field.default is not None and kind is not None and kind.section is None:
        lines.append(f"  default  {shown(field.get_default(call_default_factory=True))}")
    return [*lines, *(f"  {line}" for line in textwrap.wrap(row.doc, NARROW))]


def _aligned(table: list[Row]) -> list[str]:
    widths = [min(40, max((len(getattr(row, name)) for row in table), default=0)) for name in ("key", "value", "origin")]
    return [
        f"{row.key:<{widths[0]}}  {row.value:<{widths[1]}}  {row.origin:<{widths[2]}}  {row.doc}".rstrip() for row in table
    ]


def _rich(table: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"default": "dim", "file": "cyan", "command line": "bold yellow"}
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("key", "value", "from", "meaning"):
        out.add_column(name, overflow="fold")
    section = table[0].key.partition(".")[0] if table else ""
    for row in table:
        if row.key.partition(".")[0] != section:
            section = row.key.partition(".")[0]
            out.add_section()
        origin = Text(row.origin, style=colours.get(row.origin, "green"))
        out.add_row(Text(row.key), Text(row.value), origin, Text(row.doc, style="dim"))
    Console().print(out)
