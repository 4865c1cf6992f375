"""The image and the compose file, as far as they can be looked at without running them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

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
    pinned = dict(line.split("==") for line in (ROOT / "docker" / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["wandb"]
    needed = {re.split(r"[^A-Za-z0-9_-]", text)[0].lower() for text in texts}
    assert needed - {"torch"} <= pinned.keys()
    assert "torch" not in pinned and "ARG TORCH=2." in DOCKERFILE


def test_what_the_image_copies_is_there_and_let_through() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        for source in shlex.split(line)[:-1]:
            assert (ROOT / source).exists() and source in let_through


def test_two_nodes_make_one_job() -> None:
    nodes = [SERVICES["node0"], SERVICES["node1"]]
    for rank, node in enumerate(nodes):
        line = [*node["entrypoint"], *node["command"]]
        assert "--nnodes=2" in line and f"--node-rank={rank}" in line and "--master-addr=node0" in line
        assert node["hostname"] == f"node{rank}" and node["environment"]["DISTLLM_RANKS"] == "2"
        assert node["volumes"] == ["work:/work"] and node["cap_drop"] == ["ALL"]
        assert node["environment"]["WANDB_API_KEY"] is None  # taken from the starter's environment, by name
        train = line[line.index("train") :]
        assert (ROOT / train[1].removeprefix("/opt/distllm/")).is_file()
    assert nodes[0]["command"][1:] == nodes[1]["command"][1:]
