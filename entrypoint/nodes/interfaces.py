"""Which network interface has an address: the libraries that sum gradients want its name. Linux only."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path

SIOCGIFCONF = 0x8912  # linux/sockios.h: all IPv4 addresses, also the second ones of an interface
IFREQ_BYTES = 40  # struct ifreq: a name of 16 bytes, a family, a port, the address, and what fills up its union
MOST_ADDRESSES = 1024
IPV6_TABLE = Path("/proc/net/if_inet6")


def interface_of(address: str) -> str | None:
    """The name of the interface of this machine that has `address`; None where none has it."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        return _ipv6_interface(wanted)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = array.array("B", bytes(MOST_ADDRESSES * IFREQ_BYTES))
        request = struct.pack("iP", len(found), found.buffer_info()[0])  # struct ifconf
        used, _ = struct.unpack("iP", fcntl.ioctl(probe.fileno(), SIOCGIFCONF, request))
    raw = found.tobytes()
    for start in range(0, used, IFREQ_BYTES):
        if raw[start + 20 : start + 24] == wanted.packed:
            name = raw[start : start + 16].partition(b"\0")[0].decode()
            return name.partition(":")[0]  # eth0:1 is a label of an address of eth0
    return "lo" if wanted.is_loopback else None


def _ipv6_interface(wanted: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    with suppress(OSError):
        for line in IPV6_TABLE.read_text(encoding="ascii").splitlines():
            fields = line.split()
            if int(fields[0], 16) == int(wanted):
                return fields[-1]
    return None
