"""Two hosts on this machine, and one to launch from: each a network, a name and an /etc/hosts of its own; sshd on the two.

The namespaces have no names, so runs beside each other do not collide, and end with the process that holds them, so
nothing stays behind however the tests end. Nothing of this machine's own network is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED = ("sshd", "ssh", "ssh-keygen", "ip", "unshare", "nsenter", "setpriv")
NAMES = {"launcher": "10.77.0.254", "node1": "10.77.0.1", "node2": "10.77.0.2"}
SSHD = """
Port 22
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
"""
CLIENT = """
IdentityFile {folder}/user
IdentitiesOnly yes
UserKnownHostsFile {folder}/known
GlobalKnownHostsFile /dev/null
"""


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    absent = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install openssh-server openssh-client iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    links = "ip link add switch type bridge && ip link add one type veth peer name two && mount -t tmpfs none /run"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "sh", "-c", links], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "this machine allows no network namespaces"


class Hosts:
    """The running hosts; each is known by the process that holds its namespaces."""

    def __init__(self, folder: Path, holders: dict[str, int]) -> None:
        self.folder, self._holders = folder, holders

    def on(self, name: str, *command: str, folder: Path = Path("/")) -> list[str]:
        """The argv that runs a command on a host, in a folder."""
        return ["nsenter", f"--target={self._holders[name]}", "--net", "--uts", "--mount", f"--wd={folder}", "--", *command]

    def run(self, name: str, *command: str) -> str:
        """Run a command on a host."""
        done = subprocess.run(self.on(name, *command), capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def cable(self, name: str, *, up: bool) -> None:
        """Cut or mend the cable of a host, at the end of the launcher's."""
        self.run("launcher", "ip", "link", "set", name, "up" if up else "down")

    def processes(self, name: str) -> dict[int, str]:
        """What runs on a host, by its number: command lines."""
        network = os.readlink(f"/proc/{self._holders[name]}/ns/net")
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and os.readlink(entry / "ns" / "net") == network:
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue
        return found


@contextmanager
def hosts(folder: Path) -> Iterator[Hosts]:
    """Start the hosts, and end them and all that runs on them."""
    _files(folder)
    holders: dict[str, subprocess.Popen[bytes]] = {}
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for name in NAMES:
            holders[name] = _held("unshare", "--net", "--uts", "--mount", "sleep", "infinity")
        for holder in holders.values():
            _until(lambda pid=holder.pid: os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"))
        found = Hosts(folder, {name: holder.pid for name, holder in holders.items()})
        _wire(found, {name: holder.pid for name, holder in holders.items()})
        for name in ("node1", "node2"):
            sshd = found.on(name, "/usr/sbin/sshd", "-D", "-f", f"{folder}/sshd_config")
            daemons.append(_held(*sshd, log=folder / f"{name}.log"))
            _until(lambda name=name: _answers(found, name))
        yield found
        for pid in [pid for name in NAMES for pid in found.processes(name)]:  # what a test that failed has left
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    finally:
        for process in (*daemons, *holders.values()):
            process.kill()
            process.wait()


def _answers(found: Hosts, name: str) -> bool:
    command = found.on("launcher", f"{found.folder}/ssh", "-o", "BatchMode=yes", name, "true")
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def _files(folder: Path) -> None:
    """Keys of our own, configs, and an `ssh` that reads ours and nobody's."""
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True, timeout=30)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in NAMES.items()))
    host = (folder / "host.pub").read_text()
    (folder / "known").write_text("".join(f"{name},{address} {host}" for name, address in NAMES.items()))
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "ssh").chmod(0o755)


def _wire(found: Hosts, holders: dict[str, int]) -> None:
    """A bridge on the launcher's side, a cable from there to each node; names and addresses."""
    switch = f"ip link add switch type bridge; ip addr add {NAMES['launcher']}/24 dev switch; ip link set switch up"
    found.run("launcher", "sh", "-c", f"set -e; ip link set lo up; {switch}")
    for name in ("node1", "node2"):
        cable = (
            f"ip link add {name} type veth peer name eth0 netns {holders[name]}; "
            f"ip link set {name} master switch; ip link set {name} up"
        )
        found.run("launcher", "sh", "-c", f"set -e; {cable}")
        found.run(name, "sh", "-c", f"set -e; ip link set lo up; ip addr add {NAMES[name]}/24 dev eth0; ip link set eth0 up")
        found.run(name, "sh", "-c", "set -e; mount -t tmpfs none /run; mkdir -p /run/sshd")  # sshd's own folder
    for name in NAMES:
        found.run(name, "sh", "-c", f"hostname {name}; mount --bind {found.folder}/hosts /etc/hosts")


def _held(*command: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    """A process that ends with this one."""
    with (log or Path(os.devnull)).open("ab") as file:
        return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def _until(happened: object, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the hosts do not come up"
        time.sleep(0.05)


__all__ = ["Hosts", "hosts", "missing"]
