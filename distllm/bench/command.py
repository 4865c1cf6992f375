"""`distllm bench`, from the config to the exit code."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from distllm.bench import against
from distllm.bench.asked import OURS, Options
from distllm.bench.case import Case, Cases
from distllm.bench.cells import Cell, Room, cells_of
from distllm.bench.compare import read_record, regressions, remarks
from distllm.bench.figures import figures_of
from distllm.bench.flops import conventions, hardware_factor, shape_of
from distllm.bench.job import Job
from distllm.bench.measure import measure
from distllm.bench.picture import draw
from distllm.bench.record import record_of, write_csv, write_json
from distllm.bench.rows import MEASURED, REFUSED, Row, failed, scaled
from distllm.bench.table import ending, growing, of_sides, say
from distllm.comm import World
from distllm.config.errors import EXIT_OK, EXIT_SLOWER, ConfigError
from distllm.config.load import load
from distllm.config.places import make_folder
from distllm.data.bar import Bar
from distllm.verify.ranks import Broken, on_ranks

T = TypeVar("T")


class Bench:
    """Runs cells, on this machine or on the ranks of a job."""

    def __init__(self, options: Options, *, room: Room, folder: Path) -> None:
        """Args:
        options: what was asked for.
        room: what there is to run on.
        folder: for tokens that have to be made; `tidy` drops them.
        """
        self.options, self.room = options, room
        self._tokens = folder / ".bench-tokens"  # a name that nobody else has: the folder may hold what is not ours
        self._cases = Cases(self._tokens, synthetic=options.data == "synthetic")
        self._job = Job(room.job, cuda=room.gpus > 0) if room.job is not None else None

    @property
    def is_main(self) -> bool:
        """Whether this process shows and writes."""
        return self._job is None or self._job.rank == 0

    def run(self, cell: Cell) -> Row:
        """One cell; whatever becomes of it is a row."""
        began = time.monotonic()
        if cell.refused:
            return Row(cell, REFUSED, cell.refused[0])
        try:
            case = self._case(cell.config)
        except ConfigError as error:
            return Row(cell, REFUSED, error.problems[0])
        reports = self._on_ranks(partial(measure, case, steps=self.options.steps, warmup=self.options.warmup), cell.ranks)
        if isinstance(reports, Broken):
            row = failed(cell, reports)
        else:
            shape = shape_of(case.spec)
            flops = conventions(shape, cell.config.data.seq_len) if shape is not None else {}
            found = figures_of(reports, flops=flops, computed=hardware_factor(cell.config.activation.mode))
            row = Row(cell, MEASURED, figures=found)
        return replace(row, seconds=time.monotonic() - began)

    def beside(self, cell: Cell, ranks: int) -> dict[str, Any]:
        """distllm and the other loops in turns, data-parallel on so many ranks."""
        told: dict[str, Any] = {"ranks": ranks, "rounds": self.options.rounds, "steps": self.options.steps}
        if why := against.problem(cell.config):
            return told | {"status": REFUSED, "why": f"--against: {why}"}
        config = against.plain_data_parallel(cell.config, ranks)
        sides, steps = (OURS, *self.options.against), self.options.steps
        turns: dict[str, list[list[against.Turn]]] = {side: [] for side in sides}
        against.load_sides(self.options.against)
        total = self.options.rounds * len(sides)
        try:
            case = self._case(config)
            with Bar(f"beside others on {ranks} ranks", total=total, unit="turns", show=self.is_main) as bar:
                for side in itertools.chain.from_iterable(against.orders(sides, self.options.rounds)):
                    reports = self._on_ranks(partial(against.take_turn, case, side=side, steps=steps), ranks)
                    if isinstance(reports, Broken):
                        row = failed(cell, reports)
                        return told | {"status": row.status, "why": f"{side}: {row.why}"}
                    turns[side].append(reports)
                    bar.advance(1)
        except ConfigError as error:
            return told | {"status": REFUSED, "why": error.problems[0]}
        return told | {"status": MEASURED, "tokens": turns[OURS][0][0].tokens, "sides": against.summary(turns)}

    def nodes(self) -> dict[str, int] | None:
        """The ranks of each node of the job, on the rank that writes; None outside of a job."""
        return self._job.nodes() if self._job is not None and self.is_main else None

    def tidy(self) -> None:
        """Drop the tokens that were made: they are of the first part of the text, and no cell reads them any more."""
        if self.is_main:
            shutil.rmtree(self._tokens, ignore_errors=True)

    def leave(self) -> None:
        """Nothing more is to be run."""
        if self._job is not None:
            self._job.leave()

    def _case(self, config: Any) -> Case:
        """The case of a config; in a job, rank 0 makes the tokens while the others wait.

        Raises:
            DistllmError: a model or data that cannot be; on every rank, also where it is rank 0 that finds it.
        """
        if self._job is None:
            return self._cases.case(config)
        try:
            if self._job.rank == 0:
                return self._cases.case(config)
        finally:
            self._job.meet()
        return self._cases.case(config)

    def _on_ranks(self, function: Callable[[World], T], size: int) -> list[T] | Broken:
        timeout = self.options.timeout_s
        if self._job is not None:
            return self._job.on_ranks(function, size, timeout_s=timeout)
        return on_ranks(function, size, timeout_s=timeout, device="cuda" if self.room.gpus else "cpu")


def bench(
    file: Path, overrides: Sequence[str], options: Options, *, room: Room, folder: Path, command: str
) -> int:
    """Run a bench.

    Args:
        file: the config.
        overrides: of the command line.
        options: what was asked for.
        room: what there is to run on.
        folder: for record, table and pictures; made if missing.
        command: what was typed.

    Returns:
        EXIT_OK, or EXIT_SLOWER where `--compare` finds a regression. In a job every rank returns it.

    Raises:
        ConfigError: values that cannot be. A cell that fails is a row.
    """
    old = read_record(options.compare) if options.compare is not None else None
    cells = cells_of(file, overrides, options.points, room)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: this process starts none, and its ranks may
    try:
        running = Bench(options, room=room, folder=folder)
        if running.is_main:  # before hours of measuring
            make_folder(folder, key="--out", value=str(folder), near="runs/bench")
        try:
            rows, sides = _measured(running, cells)
        finally:
            running.tidy()
    finally:
        torch.set_num_threads(threads)
    config = load(file, overrides).config
    record = record_of(config, rows, sides=sides, options=options, room=room, nodes=running.nodes(), command=command)
    worse = list(regressions(old, record)) if old is not None else []
    if running.is_main:
        files = [write_json(folder, record), write_csv(folder, rows), *draw(folder, rows)]
        lines = [*ending(rows), *of_sides(sides)]
        if old is not None:
            lines += [f"note     {line}" for line in remarks(old, record)]
            lines += [f"SLOWER   {line}" for line in worse] or [f"compare  no worse than {options.compare}"]
        say([*lines, *(f"{'written':<9}{path}" for path in files)])
    running.leave()
    return EXIT_SLOWER if worse else EXIT_OK


def _measured(running: Bench, cells: Sequence[Cell]) -> tuple[list[Row], list[Mapping[str, Any]]]:
    """The rows of all cells, shown as they come, and what stands beside distllm."""
    rows: list[Row] = []
    turns = list(_worlds(cells)) if running.options.against else []
    with growing(len(cells), silent=not running.is_main) as watch:
        for cell in cells:
            watch.starts(cell.name)
            rows.append(running.run(cell))
            rows = scaled(rows)
            watch.add(rows[-1])
    sides: list[Mapping[str, Any]] = []
    for cell, ranks in turns:
        if running.is_main:
            say([f"beside {', '.join(running.options.against)}: {ranks} ranks, {running.options.rounds} rounds"])
        sides.append(running.beside(cell, ranks))
    return rows, sides


def _worlds(cells: Sequence[Cell]) -> Iterator[tuple[Cell, int]]:
    """For each number of ranks in the grid the first cell that is not refused."""
    seen: set[int] = set()
    for cell in cells:
        if not cell.refused and cell.ranks not in seen:
            seen.add(cell.ranks)
            yield cell, cell.ranks
