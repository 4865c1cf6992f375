"""The pipeline timeline of a config."""

from __future__ import annotations

from pathlib import Path

from distllm.config.check import resolve_layout
from distllm.config.check_pipeline import schedule_problems, virtual_stages
from distllm.config.errors import ConfigError
from distllm.config.schedule_csv import Order, read_order
from distllm.config.schema import Config
from distllm.timeline.bubbles import bubble
from distllm.timeline.order import schedule_order
from distllm.timeline.picture import draw_timeline, idle_line
from distllm.timeline.simulate import simulate


def draw_config(config: Config, path: Path, *, ranks: int) -> list[str]:
    """Draw the pipeline of a config as a PNG.

    Args:
        config: with layout.pp > 1.
        path: the file to write.
        ranks: the number of processes, from which train.accumulation may follow.

    Returns:
        Lines that say what was drawn: the idle slots, those by formula, and the file.

    Raises:
        ConfigError: there is no pipeline, or it cannot be run.
    """
    layout = config.layout
    if layout.pp == 1:
        raise ConfigError([f"layout.pp=1: has no pipeline to draw to {path}; nearest: 2"])
    if path.suffix != ".png":
        raise ConfigError([f"--timeline {path}: is written as a PNG; nearest: {path.with_suffix('.png')}"])
    accumulation = config.train.accumulation
    microbatches = accumulation if accumulation != "auto" else resolve_layout(config, ranks).accumulation
    timeline = simulate(_order(config, microbatches))
    name = layout.pp_schedule
    draw_timeline(timeline, path, title=f"{name}: {layout.pp} ranks, {microbatches} micro-batches")
    lines = [f"{name} over {layout.pp} ranks, {microbatches} micro-batches: {idle_line(timeline)}"]
    formula = None if name == "csv" else bubble(name, pp=layout.pp, microbatches=microbatches)
    if formula is not None:
        lines.append(f"by formula each rank idles {formula:g} of {timeline.length:g} slots")
    return [*lines, f"timeline {path}"]


def _order(config: Config, microbatches: int) -> Order:
    layout = config.layout
    if layout.pp_schedule == "csv":
        if layout.pp_csv is None:
            raise ConfigError(["layout.pp_schedule=csv: needs layout.pp_csv, the file; nearest: 1f1b"])
        return read_order(Path(layout.pp_csv), pp=layout.pp, microbatches=microbatches)
    virtual = virtual_stages(layout.pp_schedule, layout.pp_virtual)
    problems = list(
        schedule_problems(
            layout.pp_schedule, pp=layout.pp, virtual=virtual, microbatches=microbatches, compiled=config.train.compile
        )
    )
    if problems:
        raise ConfigError(problems)
    return schedule_order(layout.pp_schedule, pp=layout.pp, virtual=virtual, microbatches=microbatches)
