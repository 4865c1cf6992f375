"""A thousand hostile strings through every text that a user gives: nothing is executed, no #SBATCH line is added."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distllm.config.errors import ConfigError
from distllm.launch.hosts import read_hostfile, read_hosts
from distllm.launch.job import Job, Slurm, problems
from distllm.launch.sbatch import directives, sbatch_script
from distllm.launch.script import local_script, ssh_script
from distllm.launch.settings import forwarded
from distllm.launch.sweep import grid
from distllm.node_names import expand

PIECES = (
    "'", '"', "\\", "`touch made`", "$(touch made)", "${IFS}", "; touch made", "| touch made", "&& touch made", "> made", "\n", "\r",
    "\r\n", "\n#SBATCH --wrap=touch", "\n#SBATCH --uid=0\n", "#", " ", "\t", "~", "*", "?", "[a-z]", "{a,b}", "!", "!!", "%j", "%q",
    "-rf", "--", "--nodes=9", "=", ",", "\0", "\x1b[31m", "\x7f", "\u2028", "\u0085", "é", "日本", "🙂", "\ud800", "NODE", "\nNODE\ntouch made\n",
    "EOF", "$0", "$@", "$$", "$((1+1))", "'\"'\"'", "a", "run", "../..", "/etc/passwd", "file://", "../", "x=$(touch made)", "<(touch made)",
)  # fmt: skip


def hostile(count: int = 1000) -> list[str]:
    rng = random.Random(5)
    found = [*PIECES, *("".join(rng.choices(PIECES, k=rng.randint(1, 6))) for _ in range(count - len(PIECES)))]
    return found


def stubbed(tmp_path: Path) -> dict[str, str]:
    """An environment in which python, srun and ssh only say what they were given."""
    there = tmp_path / "bin"
    there.mkdir()
    say = "#!/bin/sh\nfor word in \"$@\"; do printf '%s\\0' \"$word\"; done >> \"$SEEN\"\n"
    for name in ("python", "srun"):
        (there / name).write_text(say)
        (there / name).chmod(0o755)
    (there / "ssh").write_text('#!/bin/sh\nwhile [ "$1" != bash ]; do shift; done\nexec bash -s\n')
    (there / "ssh").chmod(0o755)
    return {"PATH": f"{there}{os.pathsep}{os.environ['PATH']}", "SEEN": str(tmp_path / "seen"), "TMPDIR": str(tmp_path)}


def words_seen(script: str, folder: Path, environment: dict[str, str], *lead: str) -> list[str]:
    seen = Path(environment["SEEN"])
    seen.write_bytes(b"")
    file = folder / "script"
    file.write_text(script, encoding="utf-8")
    done = subprocess.run(["bash", *lead, str(file)], cwd=folder, env=environment, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return seen.read_bytes().decode().split("\0")[:-1]


def test_arguments_reach_the_launcher_letter_by_letter_or_are_refused(tmp_path: Path) -> None:
    environment = stubbed(tmp_path)
    good, refused = [], 0
    for text in hostile():
        job = Job("run", "runs", ("train", text, f"a={text}"), "local", "torchrun", ranks=2)
        if problems(job):
            refused += 1
        else:
            good.append(text)
    assert len(good) > 300 and refused > 300
    for text in good:
        assert not any(c in text for c in "\n\r\0\x1b\x7f\u2028\u0085\ud800")
    everything = ("train", *good)
    job = Job("run", "runs", everything, "local", "torchrun", ranks=2)
    seen = words_seen(local_script(job), tmp_path, environment)
    assert seen[seen.index("distllm") + 1 :] == list(everything)
    far = replace(job, on="ssh", hosts=("n1",), folder=str(tmp_path))
    seen = words_seen(ssh_script(far, ssh=["ssh"], address="n1", port="29500"), tmp_path, environment)
    assert seen[seen.index("distllm") + 1 :] == list(everything)
    assert not (tmp_path / "made").exists()


def test_sbatch_sees_our_lines_alone_and_bash_our_words(tmp_path: Path) -> None:
    environment = stubbed(tmp_path) | {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    plain = Job("run", "runs", ("train", "a.yaml"), "slurm", "torchrun", nodes=2, ranks=2, slurm=Slurm(cpus=1))
    count, kept = len(directives(plain)), 0
    for text in hostile():
        changed = replace(plain, words=("train", text, f"a={text}"), slurm=replace(plain.slurm, sweep=((f"b={text}",),)))
        if problems(changed):
            continue
        script = sbatch_script(changed)
        lines = [line for line in script.splitlines() if line.lstrip().startswith("#SBATCH")]
        assert lines == [f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in directives(changed)]
        assert len(lines) == count + 1  # --array
        kept += 1
        if kept % 20 == 0:
            seen = words_seen(script, tmp_path, environment)
            assert seen[seen.index("train") :][:3] == ["train", text, f"a={text}"]
            assert f"b={text}" in seen
    assert kept > 300 and not (tmp_path / "made").exists()


@pytest.mark.parametrize("field", ["name", "out", "python", "folder", "address", "interface", "host", "forward"])
def test_fields_are_quoted_or_refused(field: str, tmp_path: Path) -> None:
    environment = stubbed(tmp_path)
    hosts = ("n1", "n2") if field == "interface" else ("n1",)  # one node takes none
    plain = Job(
        "run", "runs", ("train", "a.yaml"), "ssh", "torchrun", nodes=len(hosts), ranks=2, hosts=hosts, folder=str(tmp_path)
    )
    narrow = field in ("name", "address", "interface", "host", "forward")
    for number, text in enumerate(hostile()):
        value = (text,) if field in ("host", "forward") else text
        job = replace(plain, **{"hosts" if field == "host" else field: value})
        if problems(job):
            continue
        assert not narrow or all(c.isalnum() or c in "._@-=,:^" for c in text), text
        if field in ("out", "python") and number % 20 == 0:
            script = tmp_path / "script.sh"
            script.write_text(ssh_script(job, ssh=["ssh"], address="n1", port="29500"))
            subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment, capture_output=True, timeout=30, check=False)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("key", ["partition", "account", "qos", "time", "option", "value"])
def test_options_of_sbatch_are_of_a_narrow_form(key: str) -> None:
    plain = Job("run", "runs", ("train", "a.yaml"), "slurm", "srun", nodes=2)
    for text in hostile():
        change = {"options": ((text, "x"),)} if key == "option" else {"options": (("comment", text),)} if key == "value" else {key: text}
        job = replace(plain, slurm=replace(plain.slurm, **change))
        if not problems(job):
            lines = [line for line in sbatch_script(job).splitlines() if "SBATCH" in line]
            assert len(lines) == len(directives(job)) and not any(c in " '\"\\$`#;<>\n\t~{}" for c in text)


def test_node_lists_hostfiles_sweeps_and_names_of_variables(tmp_path: Path) -> None:
    for text in hostile():
        for parse in (expand, read_hosts):
            try:
                names = parse(text)
            except ValueError:
                continue
            assert all(c.isascii() and (c.isalnum() or c in "._-@") for name in names for c in name), text
        file = tmp_path / "hostfile"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            hosts, _ = read_hostfile(file)
            assert all(c.isascii() and (c.isalnum() or c in "._-") for host in hosts for c in host), text
        except ConfigError as error:
            assert "\n" not in error.problems[0] and str(file) in error.problems[0]
        try:
            runs = grid([f"k={text}"])
            assert all("," not in word or any(c in word for c in "[{") for run in runs for word in run)
        except ConfigError as error:
            assert "\n" not in error.problems[0]
        assert all(name.isidentifier() and name.isascii() for name in forwarded([text, f"HF_{text}", "HF_HOME"]))


def test_the_command_line_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: a\ndevice: cpu\n")
    for option, text in (("--partition", "a\n#SBATCH --uid=0"), ("--interface", "$(touch made)"), ("--forward", "A;touch made")):
        command = [sys.executable, "-m", "distllm", "launch", "run.yaml", "--on", "slurm", "--print", option, text]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"distllm: {option}=")
    assert not (tmp_path / "made").exists()
