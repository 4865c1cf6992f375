import logging
import os
import stat
from pathlib import Path

import pytest

from distllm.track.log import _LogFile, close_log, open_log


def test_rank_0_writes_to_its_file_and_the_terminal_the_others_only_to_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        log = open_log(tmp_path, rank=rank, terminal=True)
        log.info(f"from {rank}")
        log.warning("careful")
        log.debug("not told")
        close_log(log)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2 and "from 0" in err and "warning: careful" in err and "from 1" not in err
    lines = (tmp_path / "logs" / "rank-1.log").read_text().splitlines()
    assert len(lines) == 2 and lines[0].endswith(" from 1") and lines[0][:2] == "20"  # a whole date


def test_a_quiet_rank_0_writes_only_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path, rank=0, terminal=False)
    log.info("quiet")
    close_log(log)
    assert capsys.readouterr() == ("", "") and "quiet" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for _ in range(2):
        log = open_log(tmp_path, rank=0, terminal=False)
        log.info("begin")
        close_log(log)
    assert (tmp_path / "logs" / "rank-0.log").read_text().count("begin") == 2


def test_nothing_is_left_in_pythons_own_loggers(tmp_path: Path) -> None:
    before = set(logging.Logger.manager.loggerDict)
    close_log(open_log(tmp_path, rank=0, terminal=True))
    assert set(logging.Logger.manager.loggerDict) == before


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        open_log(tmp_path / "file", rank=0, terminal=False)
    if os.geteuid() != 0:  # root writes everywhere
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(PermissionError):
            open_log(tmp_path, rank=0, terminal=False)


def test_a_full_disk_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("full")
    log.addHandler(_LogFile("/dev/full"))
    with pytest.raises(OSError, match="No space"):
        log.info("one")
    log.info("two")
    close_log(log)
    assert capsys.readouterr() == ("", "")
