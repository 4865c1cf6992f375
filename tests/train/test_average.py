from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distllm.checkpoint.find import Found, check, read_full
from distllm.config.errors import CheckpointError, ConfigError
from distllm.train.average import average, last_checkpoints
from tests.checkpoint.conftest import ABOUT, LOGGER, chunks_of, manager, tensors, write_two


def saved(folder: Path, step: int, **values: torch.Tensor) -> Found:
    kept = manager(folder, attempt=f"a{step}", keep=9)
    kept.save(step, chunks_of(values), rng={"torch": torch.zeros(2, dtype=torch.uint8)}, **ABOUT)
    kept.wait()
    return check(folder / f"step-{step}")


def test_the_mean_of_checkpoints_is_that_of_their_tensors(tmp_path: Path) -> None:
    for step in (1, 2, 3):  # of two ranks, each with its own part of the matrix
        write_two(tmp_path / "checkpoints", step=step)
    found = last_checkpoints(tmp_path, 2, logger=LOGGER)
    assert [one.step for one in found] == [3, 2]
    for weights, shares in ((None, (0.5, 0.5)), ((3.0, 1.0), (0.75, 0.25))):
        means = dict(average(found, weights=weights))
        assert means.keys() == {"w", "b", "none"} and means["w"].dtype == torch.float32
        for name, mean in means.items():
            new, old = (tensors(step)[f"model.{name}"].double() for step in (3, 2))
            torch.testing.assert_close(mean, (shares[0] * new + shares[1] * old).float(), rtol=1e-7, atol=0)
    whole = dict(average(found, names_prefix=""))
    assert "optim.w.exp_avg" in whole
    for name, tensor in read_full(found[0]):
        assert torch.equal(dict(average(found[:1]))[name], tensor), "of one it is itself"


def test_sums_are_double_and_whole_numbers_are_the_newest(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    half = [
        saved(folder, step, **{"model.w": torch.tensor([value], dtype=torch.bfloat16), "model.ids": torch.tensor([step])})
        for step, value in enumerate([3.0, 3.0, 3.0, 3.0, 1000.0], start=1)
    ]
    means = dict(average(half[::-1]))
    assert means["w"].dtype == torch.bfloat16 and float(means["w"]) == 202.0  # 202.4 rounded once; 204 by sums in bfloat16
    assert means["ids"].tolist() == [5]


def test_fewer_than_asked_for_is_told_with_how_to_keep_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        write_two(tmp_path / "checkpoints", step=step)
    (tmp_path / "checkpoints" / "step-2" / "config.yaml").write_text("name: ran\n")
    assert [one.step for one in last_checkpoints(tmp_path / "checkpoints", 2, logger=LOGGER)] == [3, 1]
    assert "step-2/config.yaml" in caplog.text
    (tmp_path / "checkpoints" / "step-3").rename(tmp_path / "checkpoints" / "step-3.new")
    write_two(tmp_path / "checkpoints", step=3)  # a second writing of the step is the newer, and the step counts once
    twice = last_checkpoints(tmp_path, 2, logger=LOGGER)
    assert [one.folder.name for one in twice] == ["step-3.new", "step-1"]
    with pytest.raises(CheckpointError) as raised:
        last_checkpoints(tmp_path, 5, logger=LOGGER)
    assert str(raised.value) == (
        f"{tmp_path}: 2 good checkpoints, and the average is of 5; train with checkpoint.keep=5, or average 2"
    )


def test_different_models_are_refused_in_one_line(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", 1, **{"model.w": torch.zeros(2, 3), "model.b": torch.zeros(2)})
    wide = saved(tmp_path / "b", 1, **{"model.w": torch.zeros(2, 4), "model.b": torch.zeros(2)})
    less = saved(tmp_path / "c", 1, **{"model.w": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match=r"b/step-1: not of the same model as .*a/step-1.*model\.w is \[2, 4\] F32"):
        average([first, wide])
    with pytest.raises(CheckpointError, match=r"model\.b is in only one of them"):
        average([first, less])
    for weights in ([1.0], [-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(ConfigError, match="weights of an average"):
            average([first, first], weights=weights)
    np.testing.assert_array_equal(dict(average([first, first], weights=[0.0, 2.0]))["w"], np.zeros((2, 3)))
