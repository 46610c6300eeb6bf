"""Which network interface has an address: the libraries that sum gradients want its name. Linux only."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path

SIOCGIFADDR = 0x8915  # linux/sockios.h
IPV6_TABLE = Path("/proc/net/if_inet6")


def interface_of(address: str) -> str | None:
    """The name of the interface of this machine that has `address`; None where none has it."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        return _ipv6_interface(wanted)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:  # struct ifreq: the name, a family, a port, four bytes
                    return name
    return "lo" if wanted.is_loopback else None


def _ipv6_interface(wanted: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    with suppress(OSError):
        for line in IPV6_TABLE.read_text(encoding="ascii").splitlines():
            fields = line.split()
            if int(fields[0], 16) == int(wanted):
                return fields[-1]
    return None
