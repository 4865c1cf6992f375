from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from distllm.checkpoint.find import candidates, check, find, read_facts, read_full
from distllm.config.errors import CheckpointError
from tests.checkpoint.conftest import ABOUT, LOGGER, tensors, write_two


def test_one_flipped_bit_anywhere_in_any_file_is_detected_and_the_file_named(folder: Path) -> None:
    path = write_two(folder)
    files = {p.name: p.read_bytes() for p in path.iterdir()}
    assert len(files) == 6, "two of each rank, config and manifest"
    numbers = random.Random(7)
    places = [(name, numbers.randrange(8 * len(files[name]))) for name in files for _ in range(80)]
    places += [(name, bit) for name in files for bit in (0, 8 * len(files[name]) - 1)]
    for name, bit in places:
        flipped = bytearray(files[name])
        flipped[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(flipped)
        with pytest.raises(CheckpointError) as raised:
            check(path)
        assert f"{path / name}:" in str(raised.value), (bit, raised.value)
        (path / name).write_bytes(files[name])
    check(path)


def test_a_cut_a_grown_and_a_missing_file_are_named(folder: Path) -> None:
    path = write_two(folder)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for torn in (content[:-1], content[: len(content) // 2], b"", content + b"\x00"):
            file.write_bytes(torn)
            with pytest.raises(CheckpointError, match=file.name):
                check(path)
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{file.name}: missing"):
            check(path)
        file.write_bytes(content)
    check(path)


def test_newest_is_by_number_and_a_second_writing_comes_first(tmp_path: Path) -> None:
    others = ["step-", "step-010", "step-x", "bad-step-200", ".tmp-step-300-a"]
    for name in ["step-9", "step-10", "step-10.new", "step-100", *others]:
        (tmp_path / name).mkdir()
    assert [(s, p.name) for s, p in candidates(tmp_path)] == [
        (100, "step-100"),
        (10, "step-10.new"),
        (10, "step-10"),
        (9, "step-9"),
    ]


def test_a_path_may_be_a_run_its_checkpoints_or_one_checkpoint(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (9, 10):
        write_two(folder, step=step)
    for path in (folder.parent, folder, folder / "step-10"):
        assert find(path, logger=LOGGER).step == 10
    (folder / "step-10" / "config.yaml").write_text("name: ran\n")
    found = find(folder.parent, logger=LOGGER)
    assert found.step == 9 and "step-10/config.yaml" in caplog.text
    assert (folder / "step-10").exists(), "finding changes nothing"
    with pytest.raises(CheckpointError, match=r"step-10/config\.yaml: changed"):
        find(folder / "step-10", logger=LOGGER)
    shutil.copytree(folder / "step-9", folder.parent / "copied")
    assert find(folder.parent / "copied", logger=LOGGER).step == 9


def test_nothing_to_find_is_one_clear_line(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find(folder / "nowhere", logger=LOGGER)
    folder.mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find(folder, logger=LOGGER)
    with pytest.raises(CheckpointError, match=r"step-7/manifest\.json: missing"):
        find(folder / "step-7", logger=LOGGER)
    os.unlink(write_two(folder) / "manifest.json")
    with pytest.raises(CheckpointError, match=r"none of its 1 checkpoints is good; .*manifest\.json: missing"):
        find(folder, logger=LOGGER)


def test_inference_reads_facts_and_whole_tensors(folder: Path) -> None:
    found = check(write_two(folder))
    assert read_facts(found) == ABOUT["facts"] and found.manifest.config_digest == ABOUT["config_digest"]
    read = dict(read_full(found))
    assert read.keys() == {"w", "b", "none"}
    assert all(torch.equal(value, tensors(1)[f"model.{name}"]) for name, value in read.items())
