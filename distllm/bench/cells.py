"""The cells of a grid: each a config with its number of ranks, or the rules that refuse it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distllm.bench.asked import RANKS, Point
from distllm.config.check import ranks_for, resolve_layout
from distllm.config.errors import ConfigError
from distllm.config.load import load
from distllm.config.schema import Config
from distllm.rank_facts import RankFacts
from distllm.verify.layouts import MOST_REAL, refusals

AXES = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")


@dataclass(frozen=True)
class Room:
    """What there is to run on."""

    gpus: int
    """0: a CPU."""
    cores: int
    job: RankFacts | None = None
    """This rank of the job that this runs in; None: as many processes as a cell asks for, on this machine."""

    @property
    def ranks(self) -> int | None:
        """Of the job, if there is one."""
        return self.job.size if self.job is not None else None

    @property
    def most(self) -> int:
        """Ranks of the largest cell."""
        return self.ranks or self.gpus or max(MOST_REAL, self.cores)


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    point: tuple[tuple[str, str], ...]
    """What it changes."""
    config: Config
    ranks: int
    refused: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Such as `layout.tp=2 train.micro_batch=4`; the record knows cells by it."""
        return " ".join(f"{key}={value}" for key, value in self.point) or "as configured"


def cells_of(file: Path, overrides: Sequence[str], points: Sequence[Point], room: Room) -> list[Cell]:
    """The cells of a grid over a config.

    Args:
        file: the config.
        overrides: of the command line; the grid's values come after them.
        points: the grid; empty: a few cells that suit `room`.
        room: what there is to run on.

    Raises:
        ConfigError: values that a key cannot have. What cannot be combined is a cell that is refused.
    """
    if not points:
        usual = list(_usual(load(file, overrides).config, room))
        found = [_cell(config, point, room) for config, point in zip(configs_of(file, overrides, usual), usual, strict=True)]
        different: dict[str, Cell] = {}
        for cell in found:
            if not cell.refused:
                different.setdefault(_what_runs(cell), cell)
        return list(different.values()) or found[:1]
    configs = configs_of(file, overrides, points)
    return [_cell(config, point, room) for config, point in zip(configs, points, strict=True)]


def configs_of(file: Path, overrides: Sequence[str], points: Sequence[Point]) -> list[Config]:
    """The config of each point of a grid; the grid's values come after those of the command line.

    Raises:
        ConfigError: values that a key cannot have, of all points at once.
    """
    configs, problems = [], []
    for point in points:
        values = [f"{key}={value}" for key, value in point.items() if key != RANKS]
        try:
            configs.append(load(file, [*overrides, *values]).config)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return configs


def _cell(config: Config, point: Point, room: Room) -> Cell:
    config = _steady(config, cuda=room.gpus > 0)
    ranks = int(point[RANKS]) if RANKS in point else ranks_for(config, devices=room.ranks or room.gpus)
    return Cell(tuple(point.items()), config, ranks, tuple(_refusals(config, ranks, room)))


def _what_runs(cell: Cell) -> str:
    """The same text for cells that say the same in different words."""
    sizes = resolve_layout(cell.config, cell.ranks).sizes()
    layout = cell.config.layout.model_copy(update=sizes)
    return cell.config.model_copy(update={"layout": layout}).model_dump_json()


def _steady(config: Config, *, cuda: bool) -> Config:
    """The config on this device, and without what changes the size of a step as a run goes on."""
    train = config.train.model_copy(update={"batch_ramp": 0, "seq_ramp": 0})
    return config.model_copy(update={"train": train, "device": "cuda" if cuda else "cpu"})


def _refusals(config: Config, ranks: int, room: Room) -> Iterator[str]:
    yield from refusals(config, ranks)
    if ranks > room.most:
        what = "this job has" if room.ranks else f"this machine has {'GPUs for' if room.gpus else 'room for'}"
        yield f"{RANKS}={ranks}: {what} {room.most} ranks; nearest: {room.most}"
    if config.distill.teacher is not None:
        yield f"distill.teacher={config.distill.teacher}: bench trains without a teacher; nearest: distill.teacher=null"
    if config.train.batch_tokens is not None:
        yield (
            f"train.batch_tokens={config.train.batch_tokens}: steps of unequal size cannot be timed one against another; "
            f"nearest: train.batch_tokens=null"
        )


def _usual(config: Config, room: Room) -> Iterator[Point]:
    """A few cells: the config as it is, a larger micro-batch, recomputing, and data-parallel ranks up to what there is."""
    yield {}
    if config.train.global_batch is None:
        yield {"train.micro_batch": str(2 * config.train.micro_batch)}
    yield {"activation.mode": "full"}
    if room.gpus:
        yield {"precision.compute": "bf16"}
        yield {"precision.compute": "bf16", "train.compile": "true"}
    most = room.ranks or room.gpus or min(2, room.cores)
    alone = {f"layout.{axis}": "1" for axis in AXES if getattr(config.layout, axis) != 1}
    ranks = 1
    while ranks <= most:
        if ranks == 1:
            yield alone
        else:
            yield alone | {"layout.dp_replicate": str(ranks)}
            yield alone | {"layout.dp_shard": str(ranks)}
        ranks *= 2
