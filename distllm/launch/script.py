"""Scripts for people: what `--print` shows, and what lies in launch/ to be copied and edited."""

from __future__ import annotations

from collections.abc import Sequence

from distllm.launch.commands import Place, command, hostfile
from distllm.launch.job import Job
from distllm.launch.settings import Setting, settings
from distllm.launch.words import Shell, quoted

FOLDER = Shell('"$DISTLLM_LAUNCH"')
MEET = Shell('"$DISTLLM_MEET"')
_WIDTH = 118


def local_script(job: Job) -> str:
    """A bash script that starts the job on this machine, by its launcher."""
    place = Place("0", "127.0.0.1", "29500", FOLDER, MEET)
    lines = [
        "#!/usr/bin/env bash",
        *comment(f"{job.name} on this machine: {ranks(job)}, started by {job.by}."),
        *comment("Copy it and edit it, or let `distllm launch ... --on local --print` write it."),
        "set -euo pipefail",
        "",
        *meet_in_files(),
        *exports(settings(job, folder=MEET, meet=MEET, master=None)),
        *_hostfile(job),
        "",
        *(_trap() if job.resumes else []),
        folded(command(job, place)),
    ]
    return "\n".join(lines) + "\n"


def node_script(job: Job, node: int, *, address: str, port: str) -> str:
    """What runs on one node of several; by hand, each of these at about the same time."""
    launch = f"{job.launch_folder}/ssh"
    place = Place(str(node), address, port, launch, launch)
    lines = [
        f"cd -- {quoted([job.folder])}",
        f"mkdir -p -- {quoted([launch])}",
        *exports(settings(job, folder=launch, meet=launch, master=(address, port) if job.nodes > 1 else None)),
        *([_write_hostfile(job, quoted([launch + "/hostfile"]))] if job.by == "deepspeed" else []),
        *(["trap '' USR1"] if job.resumes else []),
        "exec " + folded(command(job, place)),
    ]
    return "\n".join(lines) + "\n"


def ssh_script(job: Job, *, ssh: Sequence[str], address: str, port: str) -> str:
    """A bash script that starts the job on every node by ssh. Variables travel through ssh's input, not its arguments."""
    lines = [
        "#!/usr/bin/env bash",
        *comment(f"{job.name} on {job.nodes} nodes by ssh: {ranks(job)}, started by {job.by}."),
        *comment(
            "`distllm launch --on ssh` runs the same commands, after it has tried every node, and ends them together."
        ),
        "set -uo pipefail",
        "",
        *comment("The variables that the ranks may see. Their values go to the nodes and are never printed."),
        f"names=({quoted(job.forward)})",
        "environment() {",
        '  for name in "${names[@]}"; do',
        '    if [ -n "${!name+set}" ]; then printf \'export %s=%q\\n\' "$name" "${!name}"; fi',
        "  done",
        "}",
    ]
    for node, host in enumerate(job.hosts):
        text = node_script(job, node, address=address, port=port)
        lines += ["", f"# node {node}", "{ environment; cat <<'NODE'", text.rstrip("\n"), "NODE"]
        lines += [f"}} | {quoted([*ssh, host, 'bash', '-s'])} &"]
    lines += ["", "code=0", 'for job in $(jobs -p); do wait "$job" || code=$?; done', 'exit "$code"']
    return "\n".join(lines) + "\n"


def _trap() -> list[str]:
    return [
        *comment(
            "SIGUSR1 asks the ranks to save and end. The launcher must not die of it, and would leave them behind."
        ),
        "trap '' USR1",
    ]


def meet_in_files() -> list[str]:
    """The folder of one node in which its ranks meet; new for every start, since the files of an earlier one are taken."""
    return ["DISTLLM_MEET=$(mktemp -d)", "export DISTLLM_MEET", "trap 'rm -rf -- \"$DISTLLM_MEET\"' EXIT"]


def comment(text: str) -> list[str]:
    """Comment lines."""
    return [f"# {line}" for line in text.splitlines()]


def exports(found: Sequence[Setting]) -> list[str]:
    """A line for each setting, with its reason."""
    return [f"export {s.name}={quoted([s.value])}  # {s.why}" for s in found]


def ranks(job: Job) -> str:
    """How many ranks, in words."""
    each = f"{job.ranks} rank{'s' if job.ranks > 1 else ''}"
    return each if job.nodes == 1 else f"{job.nodes} nodes x {each}"


def folded(words: Sequence[str], *, indent: str = "  ") -> str:
    """A shell line, broken where it is long."""
    lines, line = [], ""
    for word in words:
        text = quoted([word])
        if line and len(line) + len(text) + 3 > _WIDTH:
            lines.append(line)
            line = indent + text
        else:
            line = f"{line} {text}" if line else text
    return " \\\n".join([*lines, line])


def _hostfile(job: Job) -> list[str]:
    if job.by != "deepspeed":
        return []
    return [_write_hostfile(job, f"{FOLDER}/hostfile")]


def _write_hostfile(job: Job, place: str) -> str:
    return f"printf '%s\\n' {quoted(hostfile(job).splitlines())} > {place}"
