"""Which network interface of this machine leads to an address."""

from __future__ import annotations

import socket
import struct
import sys

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def interface_toward(address: str) -> str | None:
    """The name of the interface from which packets to `address` leave; of an own address, the interface that has it.

    Args:
        address: an IPv4 address, or a name that has one.

    Returns:
        Such as `lo` or `eth0`; None where it cannot be told (IPv6, no route, another system than Linux).
    """
    if sys.platform != "linux":
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: it only asks for the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return "lo"
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == own), None)


def _address_of(name: str) -> str | None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
