"""How each rank of a launched job ended: a small file a rank, from which the first failure is told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distllm.config.errors import EXIT_BUG, EXIT_LOST, EXIT_OK, EXIT_STOPPED


@dataclass(frozen=True)
class Report:
    """The end of one rank."""

    rank: int
    node: str
    code: int
    lines: tuple[str, ...] = ()
    """What it said of its error."""
    at: float = 0.0
    """Seconds since 1970, by the node's clock."""


def write_report(folder: Path, report: Report) -> None:
    """Write down how a rank ended; a folder that is gone is no further error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".rank-{report.rank}.tmp"
        temporary.write_text(json.dumps(asdict(report)), encoding="utf-8")
        os.replace(temporary, folder / f"rank-{report.rank}.json")
    except OSError:
        return


def tell_torchrun(lines: Sequence[str], *, file: str | None, code: int) -> None:
    """Give torchrun's summary the error in our words: it names the rank whose file has the earliest time."""
    if file is None or code in (EXIT_OK, EXIT_STOPPED):
        return
    stamp = {"timestamp": str(int(time.time()))}
    message = {"message": {"message": "; ".join(lines), "errorCode": code, "extraInfo": stamp}}
    try:
        Path(file).write_text(json.dumps(message), encoding="utf-8")
    except OSError:
        return


def read_reports(folder: Path) -> list[Report]:
    """The reports of a folder by rank; files that are torn are left out."""
    found = []
    for path in folder.glob("rank-*.json"):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found.append(Report(**{**values, "lines": tuple(values["lines"])}))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return sorted(found, key=lambda report: report.rank)


def clear_reports(folder: Path) -> None:
    """Forget an earlier attempt's reports."""
    for path in folder.glob("rank-*.json"):
        path.unlink(missing_ok=True)


def first_failure(reports: Sequence[Report]) -> Report | None:
    """The rank that failed first. One that only lost its partners follows from another's end, if another has a report."""
    failed = [report for report in reports if report.code not in (EXIT_OK, EXIT_STOPPED)]
    return min(failed, key=lambda report: (report.code == EXIT_LOST, report.at, report.rank), default=None)


def outcome(reports: Sequence[Report], *, code: int, size: int) -> tuple[int, list[str]]:
    """The exit code of a job and what to say of it.

    Args:
        reports: of its ranks.
        code: what the launcher itself ended with; torchrun and accelerate say 1 for everything.
        size: ranks in all.

    Returns:
        The code of the rank that failed first; 7 when one ended without a report and the launcher says only 1; 75 when ranks
        stopped on request and none failed; and lines, the first failure first.
    """
    failed = first_failure(reports)
    silent = sorted(set(range(size)) - {report.rank for report in reports})
    if failed is not None and (failed.code != EXIT_LOST or not silent):
        words = "; ".join(failed.lines) or "see its log"
        return failed.code, [f"rank {failed.rank} on {failed.node} failed first, with exit code {failed.code}: {words}"]
    if silent and code != 0:
        several = ", ".join(str(rank) for rank in silent[:8]) + (", ..." if len(silent) > 8 else "")
        was = f"rank{'s' if len(silent) > 1 else ''} {several} ended without a word"
        why = "killed (often: out of memory), or never started; the launcher's own lines above say more"
        told = failed.code if failed is not None else EXIT_LOST if code == EXIT_BUG else code  # a bug would have been reported
        return told, [f"{was}: {why}"]
    if any(report.code == EXIT_STOPPED for report in reports):
        return EXIT_STOPPED, []
    return code, []
