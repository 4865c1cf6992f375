"""The image and the compose file, as far as they can be looked at without Docker."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from distllm.launch.commands import Place, command
from distllm.launch.job import Job
from distllm.launch.settings import settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
SERVICES = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_and_not_roots() -> None:
    base = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert base and ":" in base[1] and not base[1].endswith(":latest")
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE) == ["1000"]


def test_everything_in_the_image_is_pinned_within_the_ranges_that_ask_for_it() -> None:
    """What a release needs is read where just that release is installed; of others only the name and range are checked."""
    torch = re.search(r"^ARG TORCH=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert torch
    pinned = dict(line.split("==") for line in (ROOT / "docker" / "constraints.txt").read_text().splitlines() if "==" in line)
    assert "torch" not in pinned  # another index may have another build of it
    pins = pinned | {"torch": torch[1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo, seen = [Requirement(t) for t in project["dependencies"] + project["optional-dependencies"]["wandb"]], set()
    while todo:
        needed = todo.pop()
        name = canonicalize_name(needed.name)
        assert name in pins, f"{needed} has no pin"
        assert needed.specifier.contains(pins[name], prereleases=True), f"{name}=={pins[name]} is not {needed}"
        for extra in {"", *needed.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            todo += _requirements(name, pins[name], extra)
    installed = {name for name in pins if _version(name) == pins[name]}
    assert pins.keys() - {name for name, _ in seen} == set() or len(installed) < len(pins)  # and nothing that nobody needs


def _requirements(name: str, version: str, extra: str) -> Iterator[Requirement]:
    """What this release of a package needs here, where it is installed; of torch not what its builds for GPUs bring."""
    if _version(name) != version:
        return
    for text in importlib.metadata.requires(name) or []:
        found = Requirement(text)
        if name == "torch" and re.match("nvidia|cuda|triton", found.name):
            continue
        if found.marker is None or found.marker.evaluate({"extra": extra}):
            yield found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


@pytest.mark.parametrize(("fails", "code"), [("", 0), ("userdel", 0), ("apt-get", 1), ("useradd", 1), ("install", 1)])
def test_a_base_without_the_user_ubuntu_is_tolerated_and_nothing_else(fails: str, code: int, tmp_path: Path) -> None:
    """The first RUN, with stand-ins for what it calls."""
    text = re.search(r"^RUN (apt-get (?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    shell = re.search(r"^SHELL (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert text and shell
    for name in ("apt-get", "rm", "userdel", "useradd", "install"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\nexit {int(name == fails)}\n")
        (tmp_path / name).chmod(0o755)
    line = [*yaml.safe_load(shell[1]), text[1]]
    done = subprocess.run(line, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    called = (tmp_path / "called").read_text().split()
    assert called[-1] == (fails if code else "install") and ("useradd" in called) == (fails != "apt-get")


def test_what_the_image_copies_is_there_and_let_through() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        for source in shlex.split(line)[:-1]:
            assert (ROOT / source).exists() and source in let_through


def test_two_nodes_run_the_command_that_launch_renders() -> None:
    words = ("train", "/opt/distllm/configs/quickstart.yaml", "layout.dp_shard=2")
    job = Job("quickstart", "runs", words, "ssh", "torchrun", nodes=2, hosts=("node0", "node1"), threads=1)
    wanted = {s.name: s.value for s in settings(job, folder="f", meet="f", master=("node0", "29500"))}
    assert SERVICES.keys() == {"node0", "node1"}  # --abort-on-container-exit: a service that ends takes the others with it
    for rank, (name, node) in enumerate(SERVICES.items()):
        init, line = node["entrypoint"][:3], [*node["entrypoint"][3:], *node["command"]]
        assert init == ["tini", "-g", "--"] and line[0] == "torchrun" and node["hostname"] == name
        rendered = command(job, Place(str(rank), "node0", "29500", "f", "f"))
        assert rendered[1:3] == ["-m", "torch.distributed.run"]  # torchrun, by another name
        options, rest = line[1 : line.index("-m")], line[line.index("-m") :]
        assert sorted(options) == sorted(rendered[3 : len(rendered) - len(rest)]) and rest == rendered[-len(rest) :]
        assert (ROOT / words[1].removeprefix("/opt/distllm/")).is_file()
        environment = node["environment"]
        same = ("DISTLLM_RANKS", "DISTLLM_PREFLIGHT", "OMP_NUM_THREADS")
        assert [environment[key] for key in same] == [wanted[key] for key in same]
        others = {"DISTLLM_LAUNCH", "MASTER_ADDR", "MASTER_PORT"}  # torchrun sets the last two
        assert wanted.keys() - environment.keys() == others
        assert environment["WANDB_API_KEY"] is None  # taken from the starter's environment, by name
        grace = re.fullmatch(r"(\d+)m", node["stop_grace_period"])
        assert grace and 30 < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 60 * int(grace[1])
        assert node["volumes"] == ["work:/work"] and node["cap_drop"] == ["ALL"] and "user" not in node


def test_what_compose_gives_the_build_is_an_argument_of_it() -> None:
    for node in SERVICES.values():
        assert (ROOT / "docker" / node["build"]["context"] / node["build"]["dockerfile"]).samefile(ROOT / "docker" / "Dockerfile")
        for name, value in node["build"]["args"].items():
            assert value is None and re.search(rf"^ARG {name}=", DOCKERFILE, re.MULTILINE)
