import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distllm.track.progress import Progress, clock_face

SCRIPT = """
import sys
from pathlib import Path
from distllm.track.log import open_log, close_log
from distllm.track.progress import Progress
log = open_log(Path(sys.argv[1]), rank=0, terminal=True)
with Progress(20, start=4, terminal=True, unit="step") as bar:
    for step in range(5, 21):
        bar.advance(step, f"loss {step}.5 [b]")
        if step % 10 == 0:
            log.info(f"logged {step} [red]x[/red]")
    bar.advance(20)
close_log(log)
"""


def run(folder: Path, *, terminal: str) -> str:
    """What the script puts on a terminal of that kind."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": terminal, "COLUMNS": "100", "LINES": "30"}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
        os.close(master)
        assert process.wait() == 0, seen
    return seen.decode()


def test_on_a_terminal_the_log_passes_above_a_bar_that_reaches_its_end(tmp_path: Path) -> None:
    seen = run(tmp_path, terminal="xterm")
    assert "20/20" in seen and "loss 20.5 [b]" in seen  # an update without a text keeps the last
    for step in (10, 20):
        assert seen.count(f"logged {step} [red]x[/red]") == 1
    for line in seen.split("\n"):  # the bar is wiped before a line is written, and drawn again below it
        if "logged" in line:
            assert re.search(r"\x1b\[2K[\d:]+ logged \d+ \[red]x\[/red]\r$", line), line


def test_on_a_dumb_terminal_and_in_a_pipe_there_are_only_plain_lines(tmp_path: Path) -> None:
    seen = run(tmp_path, terminal="dumb")
    assert "\x1b" not in seen and "20/20" not in seen and seen.count("\n") == 2


def test_nothing_is_drawn_when_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (True, False):
        with Progress(3, terminal=terminal) as bar:
            bar.advance(1, "loss")
    assert capsys.readouterr() == ("", "")


def test_times_are_shown_as_the_bar_shows_them() -> None:
    shown = {0.4: "0:00", 59.7: "1:00", 750: "12:30", 3599.4: "59:59", 3600: "1:00:00", 11550: "3:12:30", 100000: "27:46:40"}
    assert {seconds: clock_face(seconds) for seconds in shown} == shown
