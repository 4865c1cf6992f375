import json
import math
import random
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from distllm.config.errors import DistllmError
from distllm.report import PICTURES, _smooth, report


def write_run(folder: Path, *, steps: int = 60, names: tuple[str, ...] = ()) -> Path:
    """A run folder with plausible metrics; with `names`, only those."""
    chance = random.Random(1)
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, 10 * steps + 1, 10):
            line = {
                "loss": 2 + 5 * math.exp(-step / 200) + chance.gauss(0, 0.05), "grad_norm": 1 + 2 / step, "lr": 1e-3 / step,
                "tokens_per_s": 2e4 + chance.gauss(0, 300), "mfu": 0.4, "data_wait_share": 1e-3, "skipped": int(step >= 50),
                "peak_memory_bytes": 8e8 + step, "tokens": step * 512, "samples": step * 8, "time_s": step * 0.5,
            }  # fmt: skip
            if step == 50:
                line["loss"] = "nan"
            if step % 50 == 0:
                line["val_loss"] = 2.2 + 5 * math.exp(-step / 200)
            chosen = {k: v for k, v in line.items() if not names or k in names}
            file.write(json.dumps({"step": step, **chosen}) + "\n")
    return folder


def colours(path: Path) -> int:
    """How many clearly different colours fill at least 30 pixels of a picture."""
    pixels = (matplotlib.image.imread(path)[..., :3] * 7).round().astype(int).reshape(-1, 3)
    return int((np.unique(pixels, axis=0, return_counts=True)[1] >= 30).sum())


def test_every_picture_is_there_and_shows_something(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text(json.dumps({"unigram_loss": 6.1}))
    written = report(run)
    assert [path.name for path in written] == [f"{name}.png" for name in PICTURES] + ["summary.md"]
    for path in written[:-1]:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] == 1170 and pixels.shape[0] > 500
        assert colours(path) >= 5, path
    text = (run / "report" / "summary.md").read_text()
    for part in ("| unigram baseline loss | 6.1000 |", "| last step | 600 |", "| time | 5 min |", "![loss](loss.png)",
                 "| val_loss |", "| steps skipped (not finite) | 1 |"):  # fmt: skip
        assert part in text, part


def test_the_curves_and_the_baseline_are_in_the_loss_picture(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    loss = report(run)[0]

    def pixels_of(red: int, green: int, blue: int) -> int:
        near = np.abs(matplotlib.image.imread(loss)[..., :3] * 255 - (red, green, blue)).max(-1) < 12
        return int(near.sum())

    train, validation, baseline = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x66, 0x66, 0x66)
    assert pixels_of(*train) > 500 and pixels_of(*validation) > 300
    before = pixels_of(*baseline)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 600, "unigram_loss": 4.0}\n')
    report(run)
    assert pixels_of(*baseline) > before + 500


def test_missing_metrics_leave_out_pictures_also_those_of_an_earlier_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    report(run)
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n{"step": 3, "val_loss": 2.5}\n')
    assert [path.name for path in report(run)] == ["loss.png", "summary.md"]
    assert {path.name for path in (run / "report").iterdir()} == {"loss.png", "summary.md"}
    (run / "metrics.jsonl").write_text('{"step": 3}\n')
    assert [path.name for path in report(run)] == ["summary.md"]


def test_values_that_are_not_finite_do_not_break_a_picture(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = ['{"step": 1, "loss": "nan", "grad_norm": "inf"}', '{"step": 2, "loss": "nan", "grad_norm": 1e30}']
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [path.name for path in report(run)] == ["loss.png", "gradient_norm.png", "summary.md"]
    assert "| loss | not finite |" in (run / "report" / "summary.md").read_text()


def test_a_gradient_that_explodes_gets_a_logarithmic_axis(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [json.dumps({"step": s, "grad_norm": 1e6 if s == 50 else 1.0 + s / 100}) for s in range(1, 101)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    picture = report(run)[0]
    assert picture.name == "gradient_norm.png" and colours(picture) >= 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, r"run: not a run, there is no metrics\.jsonl"),
        ("", r"metrics\.jsonl: the file is empty"),
        ('{"step": 1}\n{broken\n{"step": 2}\n', r"metrics\.jsonl:2: not a metrics line"),
    ],
)
def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path: Path, content: str | None, told: str) -> None:
    run = tmp_path / "run"
    with pytest.raises(DistllmError, match="there is no such folder"):
        report(run)
    run.mkdir()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(DistllmError, match=told) as error:
        report(run)
    assert "\n" not in str(error.value) and not (run / "report").exists()


def test_a_run_that_is_going_on_and_a_damaged_summary_are_no_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, names=("loss",))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    (run / "summary.json").write_text("{")
    assert [path.name for path in report(run)] == ["loss.png", "summary.md"]


def test_the_running_mean_is_level_at_the_ends_and_skips_gaps() -> None:
    line = [float(i) for i in range(200)]
    assert _smooth(line) == pytest.approx(line)
    gap = [1.0] * 50 + [math.nan] + [1.0] * 50
    smooth = _smooth(gap)
    assert math.isnan(smooth[50]) and smooth[:50] + smooth[51:] == pytest.approx([1.0] * 100)
