"""The table on the terminal, while it grows, and the certificate at its end."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from distllm.track.growing import Growing
from distllm.verify.engines import NATIVE
from distllm.verify.judge import QUANTITIES
from distllm.verify.rows import Row

SHOWN = ("loss", "gradient", "norm", "clip", "weight")
PLURALS = {"loss": "losses", "gradient": "gradients", "norm": "norms", "clip": "clip factors", "weight": "weights"}


def growing(total: int) -> Growing[Row]:
    """The table of `total` layouts on the terminal."""
    return Growing(total, table=_table, line=lambda row: "  ".join(_cells(row, plain=True)))


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("layout", "ranks", *SHOWN, "sent / formula", "verdict"):
        table.add_column(title, justify="left" if title in ("layout", "verdict") else "right", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row, plain=False))
    return table


def _cells(row: Row, *, plain: bool) -> list[str]:
    head = [row.name.ljust(34) if plain else row.name, str(row.layout.ranks)]
    if row.verdict is None:
        text = f"refused: {row.refused[0]}" if row.refused else f"broken: {row.broken}"
        return [*head, text] if plain else [*head, *[""] * (len(SHOWN) + 1), _coloured(text, "yellow" if row.refused else "red")]
    own, wanted = row.sent()
    sent = f"{_short(own)} / {'no formula' if row.unpredictable else _short(wanted)}"
    if "collectives" in row.not_exposed:
        sent = "not judged"
    errors = [_error(row.verdict.errors[name]) if name in row.verdict.worst else "-" for name in SHOWN]
    good = "shapes and traffic equal" if row.fake else "equal"
    text = good if row.equal else f"different: {row.verdict.problems[0]}"
    if plain:
        return [*head, *(f"{name} {error}" for name, error in zip(SHOWN, errors, strict=True)), f"sent {sent}", text]
    return [*head, *errors, sent, _coloured(text, "green" if row.equal else "red")]


def _coloured(text: str, colour: str) -> str:
    return f"[{colour}]{text.replace('[', chr(92) + '[')}[/{colour}]"


def _error(value: float) -> str:
    return "0" if value == 0.0 else f"{value:.0e}" if math.isfinite(value) else "inf"


def _short(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def certificate(
    rows: Sequence[Row],
    *,
    what: str,
    guards: Sequence[str],
    faults: Sequence[Mapping[str, Any]],
    files: Sequence[Path],
    config: str,
    holds: bool,
    options: str = "",
) -> list[str]:
    """The lines at the end: what is equal to how many digits, what is not, where the files are, what to type next.

    Args:
        rows: what was tried.
        what: the small model, beside the user's.
        guards: those that were tripped.
        faults: those that were planted, with what caught them.
        files: what was written.
        config: the config and its overrides, as they were typed.
        holds: whether nothing differs.
        options: those of the command that say how to verify, and not which layouts, as they were typed.
    """
    lines = ["", what]
    for kind in dict.fromkeys(row.kind for row in rows):
        lines += _of_kind([row for row in rows if row.kind == kind], kind)
    fake = [row for row in rows if row.fake and row.equal]
    if fake:
        lines += [
            f"{len(fake)} layouts are too large for this machine: a few ranks of each ran without the others,",
            "and their shapes, placements and collectives are what arithmetic says",
        ]
    lines += [f"guard: {line}" for line in guards]
    if faults:
        caught = sum(1 for fault in faults if fault["caught"])
        planted = sum(1 for fault in faults if fault["caught"] is not None)
        lines.append(f"{caught} of {planted} planted faults were caught" + (
            f"; {len(faults) - planted} have no place in this model" if planted < len(faults) else ""
        ))  # fmt: skip
        lines += [f"  NOT CAUGHT: {fault['name']}: {fault['what']}" for fault in faults if fault["caught"] is False]
    lines += [f"{'written':<8}{path}" for path in files]
    return [*lines, f"{'next':<8}{_next(rows, holds=holds, config=config, options=options)}"]


def _next(rows: Sequence[Row], *, holds: bool, config: str, options: str) -> str:
    """The command to type: train what is proven, else look at the first layout that is not equal alone."""
    if holds:
        return f"distllm train {config}"
    more = f" {options}" if options else ""
    wrong = next((row for row in rows if not row.holds), None)
    if wrong is None:
        return f"distllm verify {config} --ranks 2{more}"
    asked = ",".join(f"{key}={value}" for key, value in wrong.layout.values) or "dp_shard=1"
    engine = "" if wrong.engine == NATIVE or "--engines" in options else f" --engines {wrong.engine.name}"
    return f"distllm verify {config} --layouts {shlex.quote(asked)}{engine}{more}"


def _of_engine(equal: Sequence[Row]) -> Iterator[str]:
    """To which tolerances another engine than the native one is equal, and what it does not show."""
    first = equal[0]
    if first.engine == NATIVE or first.verdict is None:
        return
    bounds = first.verdict.bounds
    told = [f"{name} {getattr(bounds, name):.0e}" for name in QUANTITIES if getattr(bounds, name)]
    first_step = "; gradient and norm at the first step" if bounds.steps == 1 else ""
    yield f"  tolerances: {', '.join(told)}, start to the bit{first_step}"
    yield from (f"  not exposed: {name}: {why}" for name, why in first.not_exposed.items())


def _of_traffic(equal: Sequence[Row]) -> str:
    if equal[0].engine != NATIVE:
        return "collectives are DeepSpeed's own and not judged"
    unsaid = sum(1 for row in equal if row.unpredictable)
    if not unsaid:
        return "and every collective is the one that the formula says"
    if unsaid == len(equal):
        return "collectives were recorded and not judged: no formula says them"
    return f"and every collective is the one that the formula says, but for {unsaid} layouts whose traffic no formula says"


def _of_kind(rows: Sequence[Row], kind: str) -> list[str]:
    """What is equal and what is not among rows of one engine and precision."""
    real = [row for row in rows if row.verdict is not None and not row.fake]
    equal = [row for row in real if row.equal]
    lines = []
    if equal and equal[0].verdict is not None:
        bounds = equal[0].verdict.bounds
        judged = [name for name in QUANTITIES if getattr(bounds, name) is not None]
        worst = max(row.verdict.errors[name] for row in equal if row.verdict is not None for name in judged)
        digits = f"{-math.log10(worst):.0f} digits" if worst > 0 else "every digit"
        what = ", ".join(plural for name, plural in PLURALS.items() if name in judged)
        things, of = ("layouts", "") if equal[0].engine == NATIVE else ("layouts and stages", " of the native engine")
        lines += [
            f"{len(equal)} of {len(real)} {things} compute what one process{of} computes ({kind}):",
            f"{what} agree to {digits}, samples come in the same order,",
            _of_traffic(equal),
            *_of_engine(equal),
        ]
    for row in real:
        if not row.equal and row.verdict is not None:
            lines.append(f"DIFFERENT: {row.name}:")
            lines += [f"  {problem}" for problem in row.verdict.problems[:6]]
    lines += [f"BROKEN: {row.name}: {row.broken}" for row in rows if row.verdict is None and not row.refused]
    refused: dict[str, list[str]] = {}
    for row in rows:
        for rule in row.refused[:1]:
            refused.setdefault(rule, []).append(row.name)
    count = sum(len(names) for names in refused.values())
    if count:
        lines.append(f"{count} of {len(rows)} layouts refused by a rule:")
        lines += [f"  {rule} ({len(names)}: {names[0]}{', ...' if len(names) > 1 else ''})" for rule, names in refused.items()]
    return lines


def say(lines: Sequence[str]) -> None:
    """Write lines to stdout."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
