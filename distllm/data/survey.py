"""What one reading of all examples shows before any is tokenised: that each is right, the labels, and the repeats."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distllm.config.errors import DataError
from distllm.config.schema import Config, SourceConfig
from distllm.data.dedup import Repeats, drops
from distllm.data.rows import Row, read_rows, task_kind

LABELLED = ("classification", "regression")
Labels = Mapping[str, tuple[str, ...]]
Named = Sequence[tuple[str, SourceConfig]]
log = logging.getLogger("distllm.data")


@dataclass(frozen=True)
class Survey:
    """What one reading of all rows shows."""

    labels: Labels
    """The label names of each task with a head (the only task is named ""), in the order of their numbers; () for a number."""
    dropped: Mapping[str, frozenset[int]]
    """The rows, by number from 0, that repeat an earlier one, of each training source by its store name."""
    counts: Mapping[str, int]
    """Examples that stay, by store name."""


def survey(config: Config, named: Named) -> Survey:
    """Read all rows once: check them, collect the labels, and find the repeats among the training rows.

    Args:
        config: its task and data.
        named: (store name, source), the training sources first.

    Raises:
        DataError: a row is wrong, nothing is left of a source, or a label of the validation data is not among those of training.
    """
    repeats = {task: Repeats(config.data.dedup) for task in ("", *config.task.tasks)}  # a text may be an example of two
    seen: dict[str, set[str]] = {}
    dropped: dict[str, frozenset[int]] = {}
    counts: dict[str, int] = {}
    labels: Labels | None = None
    for name, source in named:
        kind, task = task_kind(config, source), task_name(config, source)
        training = name.startswith("train")
        if not training and labels is None:
            labels = _settle(config, seen)
        given = _given_labels(config, task)
        again: set[int] = set()
        count = 0
        for number, row in enumerate(read_rows(source, kind=kind, cleaning=config.data.clean)):
            count += 1
            if training and drops(config.data.dedup) and repeats[task].seen(_whole(row)):
                again.add(number)
                continue
            if kind == "classification" and labels is None and not given:
                seen.setdefault(task, set()).add(str(row.label))
            elif kind == "classification":
                class_of(row, given or (labels or {})[task], source, given=bool(given))
        counts[name] = count - len(again)
        if training:
            if again and not counts[name]:
                rule = f"all {count} examples repeat earlier ones, and data.dedup drops them; leave the source out"
                raise DataError(f"{source.path}: {rule}")
            dropped[name] = frozenset(again)
            if drops(config.data.dedup):
                log.info("%s: %d of %d examples repeat an earlier one and are dropped", source.path, len(again), count)
    return Survey(labels if labels is not None else _settle(config, seen), dropped, counts)


def task_name(config: Config, source: SourceConfig) -> str:
    """The task of a source where there are several, else ""."""
    return (source.task or "") if config.task.kind == "multi_task" else ""


def _whole(row: Row) -> str:
    """The text by which rows are compared: with its pair and target, without its label."""
    if row.messages is not None:
        return "\n".join(f"{m['role']}: {m['content']}" for m in row.messages)
    return "\n".join(part for part in (row.text, row.pair, row.target) if part is not None)


def _given_labels(config: Config, task: str) -> tuple[str, ...]:
    return tuple(config.task.tasks[task].labels if task else config.task.labels)


def _settle(config: Config, seen: Mapping[str, Collection[str]]) -> Labels:
    """The labels of each task: as the config lists them, else those seen, sorted, numbers as numbers."""
    kinds: dict[str, str] = {"": config.task.kind} if config.task.kind in LABELLED else {}
    if config.task.kind == "multi_task":
        kinds = {name: head.kind for name, head in config.task.tasks.items()}
    found: dict[str, tuple[str, ...]] = {}
    for task, kind in kinds.items():
        found[task] = ()
        if kind != "classification":
            continue
        found[task] = _given_labels(config, task) or tuple(sorted(seen.get(task, ()), key=_label_order))
        where = f"task {task}" if task else "the training data"
        if len(found[task]) == 1:
            raise DataError(f"{where}: every label is {found[task][0]!r}; a classifier needs two classes or more")
        if not found[task]:
            raise DataError(f"{where}: no training source has examples for it; give one with `task: {task}`")
    return found


def _label_order(label: str) -> tuple[bool, float, str]:
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    return (not math.isfinite(number), number if math.isfinite(number) else 0.0, label)


def class_of(row: Row, labels: Sequence[str], source: SourceConfig, *, given: bool = False) -> int:
    """The number of a row's label.

    Args:
        row: its label is a name.
        labels: the names in the order of their numbers.
        source: of the row, for the message.
        given: whether the config lists the labels.

    Raises:
        DataError: the label is none of them.
    """
    if row.label in labels:
        return labels.index(str(row.label))
    known = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
    what = "is none of the `labels` of the task" if given else "is none that training knows"
    wrong = f"the label {row.label!r} in column {source.label_column!r} {what} ({known})"
    raise DataError(f"{row.place}: {wrong}; mend it, or drop the row")


def kept_rows(config: Config, name: str, source: SourceConfig, found: Survey) -> Iterator[Row]:
    """The examples of a source without those that repeat an earlier one.

    Args:
        config: its task and cleaning.
        name: the source's store name.
        source: where they are.
        found: what `survey` found.
    """
    dropped = found.dropped.get(name, frozenset())
    rows = read_rows(source, kind=task_kind(config, source), cleaning=config.data.clean)
    return (row for number, row in enumerate(rows) if number not in dropped)
