"""The timeline of a config, as a picture and in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from distllm.config.errors import ConfigError
from distllm.config.schema import Config, LayoutConfig, TrainConfig
from distllm.timeline.of_config import draw_config
from distllm.timeline.order import schedule_order
from distllm.timeline.picture import draw_timeline, idle_line
from distllm.timeline.simulate import simulate


def config(accumulation: int = 8, **layout: object) -> Config:
    return Config(layout=LayoutConfig.model_validate({"pp": 4, **layout}), train=TrainConfig(accumulation=accumulation))


def test_a_config_is_drawn_and_its_idle_slots_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    assert draw_config(config(), path, ranks=4) == [
        "1f1b over 4 ranks, 8 micro-batches: 36 of 132 slots idle, 27.3 %",
        "by formula each rank idles 9 of 33 slots",
        f"timeline {path}",
    ]
    picture = imread(path)
    assert picture.shape[0] > 300 and picture.shape[1] > 900
    assert len({tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, picture.shape[2])}) > 3


def test_a_schedule_of_the_users_own_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "schedule.csv"
    file.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    lines = draw_config(config(2, pp=2, pp_schedule="csv", pp_csv=str(file)), tmp_path / "out.png", ranks=2)
    assert lines[0] == "csv over 2 ranks, 2 micro-batches: 6 of 18 slots idle, 33.3 %" and len(lines) == 2


def test_large_and_small_timelines_are_drawn(tmp_path: Path) -> None:
    for pp, microbatches in ((2, 4), (16, 64)):
        timeline = simulate(schedule_order("zbv", pp=pp, virtual=2, microbatches=microbatches))
        path = tmp_path / f"{pp}.png"
        draw_timeline(timeline, path, title="zbv")
        assert path.stat().st_size > 5000
    assert idle_line(timeline) == "240 of 6384 slots idle, 3.8 %"


@pytest.mark.parametrize(
    ("given", "path", "line"),
    [
        (config(pp=1), "t.png", "layout.pp=1: has no pipeline to draw to t.png; nearest: 2"),
        (config(), "t.jpg", "--timeline t.jpg: is written as a PNG; nearest: t.png"),
        (config(pp_schedule="csv"), "t.png", "layout.pp_schedule=csv: needs layout.pp_csv, the file; nearest: 1f1b"),
        (config(3), "t.png", "train.accumulation=3: 1f1b over layout.pp=4 needs at least 4 micro-batches a step; nearest: 4, or "
         "layout.pp_schedule=gpipe"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(given: Config, path: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        draw_config(given, Path(path), ranks=4)
    assert str(error.value) == line


def test_drawing_needs_no_torch() -> None:
    code = "import sys, distllm.timeline.of_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
