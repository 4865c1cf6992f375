"""The nodes of a job by ssh: from a list on the command line, or from a hostfile."""

from __future__ import annotations

import re
from pathlib import Path

from distllm.config.errors import ConfigError
from distllm.launch.words import told
from distllm.node_names import expand

_LINE = re.compile(r"(?P<host>\S+)(?:\s+(?:slots|max_slots)\s*=\s*(?P<slots>\d{1,4}))?")


def read_hosts(text: str) -> tuple[str, ...]:
    """The hosts of `--hosts`: names with commas between them, ranges as in SLURM, a user before an @.

    Raises:
        ConfigError: it does not parse.
    """
    found: list[str] = []
    for word in re.split(r",(?![^\[]*\])", text):
        user, at, names = word.strip().rpartition("@")
        found += [user + at + name for name in _expanded(names, where=f"--hosts={told(text)}")]
    return tuple(found)


def read_hostfile(path: Path) -> tuple[tuple[str, ...], int | None]:
    """The hosts of a hostfile, `NAME slots=N` a line as DeepSpeed and MPI have it.

    Returns:
        The hosts, and the number of slots of each where the file says it.

    Raises:
        ConfigError: it cannot be read, or a line does not parse: names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no text"
        raise ConfigError(
            [f"--hostfile={told(str(path))}: {why}; nearest: a file with a line `node1 slots=8` a node"]
        ) from error
    hosts: list[str] = []
    slots: dict[str, int | None] = {}
    for number, line in enumerate(lines, start=1):
        text = line.split("#")[0].strip()
        match = _LINE.fullmatch(text)
        where = f"{path}:{number}"
        if text and match is None:
            raise ConfigError([f"{where}: {told(text)!r} does not parse; nearest: node1 slots=8"])
        for host in _expanded(match["host"], where=where) if text and match else []:
            if host in slots:
                raise ConfigError([f"{where}: {host} is there twice; nearest: once, with more slots"])
            hosts.append(host)
            slots[host] = int(match["slots"]) if match and match["slots"] else None
    if not hosts:
        raise ConfigError([f"{path}:1: names no host; nearest: node1 slots=8"])
    counts = set(slots.values())
    if len(counts) > 1 or 0 in counts:
        odd = next(host for host in hosts if slots[host] != slots[hosts[0]] or slots[host] == 0)
        raise ConfigError(
            [f"{path}: every node must have the same number of slots, and {odd} has another; nearest: one number"]
        )
    return tuple(hosts), counts.pop()


def _expanded(names: str, *, where: str) -> list[str]:
    try:
        return expand(names)
    except ValueError as error:
        raise ConfigError([f"{where}: {told(str(error))}"]) from error
