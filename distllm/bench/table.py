"""The table on the terminal, while it grows, and the lines at its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from distllm.bench.rows import MEASURED, REFUSED, Row
from distllm.track.growing import Growing

TITLES = ("ranks", "tokens/s", "step", "spread", "MFU", "memory", "sent", "wait", "scaling")


def growing(total: int, *, silent: bool = False) -> Growing[Row]:
    """The table of `total` cells on the terminal; `silent` shows nothing, as a later rank of a job."""
    return Growing(total, table=_table, line=lambda row: "  ".join(_plain(row)), silent=silent)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cell", overflow="fold")
    for title in TITLES[:-1]:
        table.add_column(title, justify="right", overflow="fold")
    table.add_column(TITLES[-1], overflow="fold")
    for row in rows:
        table.add_row(row.cell.name.replace("[", "\\["), str(row.cell.ranks), *_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    if row.figures is None:
        colour = "yellow" if row.status == REFUSED else "red"
        text = f"{row.status}: {row.why}".replace("[", "\\[")
        return [*[""] * (len(TITLES) - 2), f"[{colour}]{text}[/{colour}]"]
    return list(told(row).values())


def told(row: Row) -> dict[str, str]:
    """Title -> what stands there, of a row with figures."""
    figures = row.figures
    assert figures is not None
    off = (figures.time.high - figures.time.low) / figures.time.median
    return {
        "tokens/s": f"{figures.tokens_per_s:,.0f}",
        "step": f"{1000.0 * figures.time.median:,.1f} ms",
        "spread": f"{100.0 * off:.1f} %",
        "MFU": f"{100.0 * figures.mfu['palm']:.1f} %" if figures.mfu else "-",
        "memory": size(figures.memory),
        "sent": "-" if figures.sent is None else size(figures.sent),
        "wait": f"{100.0 * figures.wait_share:.2f} %",
        "scaling": "-" if row.scaling is None else f"{row.scaling.kind} {row.scaling.efficiency:.2f}",
    }


def _plain(row: Row) -> list[str]:
    head = [row.cell.name.ljust(34), f"ranks {row.cell.ranks}"]
    if row.figures is None:
        return [*head, f"{row.status}: {row.why}"]
    return [*head, *(f"{title} {text}" for title, text in told(row).items())]


def size(count: float) -> str:
    """Bytes for people."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"


def ending(rows: Sequence[Row]) -> list[str]:
    """What was measured against which peak, under every convention, and the fastest cell."""
    measured = [row for row in rows if row.figures is not None]
    others = {status: sum(row.status == status for row in rows) for status in dict.fromkeys(r.status for r in rows)}
    lines = ["", ", ".join(f"{count} {status}" for status, count in others.items())]
    if not measured:
        return lines
    best = max(measured, key=lambda row: row.figures.tokens_per_s if row.figures is not None else 0.0)
    figures = best.figures
    assert figures is not None and best.status == MEASURED
    lines.append(f"fastest  {best.cell.name}: {figures.tokens_per_s:,.0f} tokens/s on {best.cell.ranks} ranks")
    lines.append(f"peak     {figures.peak / 1e12:.4g} TFLOP/s ({figures.peak_name}); "
                 f"matrix products ran at {figures.matrix_rate / 1e12:.4g} TFLOP/s")  # fmt: skip
    if figures.mfu:
        shares = ", ".join(f"{name} {100.0 * share:.1f} %" for name, share in figures.mfu.items())
        hfu = f"; HFU {100.0 * figures.hfu:.1f} %" if figures.hfu is not None else ""
        lines.append(f"MFU      {shares}{hfu}")
    return lines


def of_sides(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of distllm beside others; each is what `against.summary` gives."""
    lines = []
    for one in found:
        lines.append(f"beside   {one['ranks']} ranks, CPU-seconds a million tokens:" if "sides" in one else
                     f"beside   {one['ranks']} ranks: {one['status']}: {one['why']}")  # fmt: skip
        for side, figures in one.get("sides", {}).items():
            ratio = figures.get("ratio")
            text = "" if ratio is None else (
                f"; distllm takes {ratio['median']:.3f} of it ({ratio['low']:.3f} to {ratio['high']:.3f} over the rounds)"
            )  # fmt: skip
            lines.append(f"  {side:<17}{1e6 * figures['cpu_s_per_token']:,.1f}{text}")
    return lines


def say(lines: Sequence[str]) -> None:
    """Write lines to stdout."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
