"""Only public hosts: for a job whose addresses come from a stranger, as those of a serverless request do.

An address can lead inside in many ways: by a name that resolves to 127.0.0.1, by one that resolves to something else
when it is asked for again, by a redirect, by 2130706433 or ::ffff:10.0.0.1 in the place of a name, or by a link in a
file that a library follows. So what counts is the address that a socket is connected to: `guard` adds an audit hook,
which Python calls before each connection of one of its sockets, and which no code can take away. Libraries that connect
by compiled code of their own are not seen by it: obstore is the one that we have, and `doors.buckets` does not call it
in a guarded process.

`problem_of` says beforehand what is wrong with an address as it is written.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from trainer.spec.errors import SettingsError

VARIABLE = "KILN_PUBLIC_ADDRESSES"  # set to 1, it makes every program of ours that uses the network a guarded one
REFUSED = (
    "An address of this job, or a redirect from it, leads to a host that is not public. Fix: put the file where "
    "everybody can reach it by https, or into a dataset of the Hub."
)
CONNECTING = ("socket.connect", "socket.sendto", "socket.sendmsg")  # audit events with a socket and an address
# All that is not among them is for local networks, for tests, or for nobody: RFC 4291.
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
INSIDE = ("localhost", "local", "internal", "intranet", "lan", "home", "corp", "private", "arpa", "test", "invalid")
_HOST = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))+")


def guard(environment: Mapping[str, str]) -> None:
    """Let this process connect to public addresses alone, where `environment` asks for it. It cannot be undone.

    The Hub that HF_ENDPOINT names may be anywhere: it is the operator's choice.
    """
    if environment.get(VARIABLE):
        sys.addaudithook(_Hook(_endpoint(environment.get("HF_ENDPOINT", ""))))


def forbid() -> None:
    """Let this process connect to nothing: it reads what others have downloaded."""
    sys.addaudithook(_Hook(frozenset(), public=False))


class _Hook:
    """Refuses connections. An instance is called for each of Python's audit events."""

    def __init__(self, trusted: Collection[tuple[str, int]], *, public: bool = True) -> None:
        self._trusted = trusted
        self._public = public

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CONNECTING:
            self._check(*arguments[:2])

    def _check(self, connection: socket.socket, address: Any) -> None:
        """Raises SettingsError, which no library takes for a failure of the network that may pass."""
        if connection.family == socket.AF_UNIX or address is None:  # None: it is connected already
            return
        is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
        host, port = address[:2] if is_internet and isinstance(address, tuple) else ("", 0)
        if (host, port) in self._trusted or (self._public and is_public(host)):
            return
        raise SettingsError(REFUSED)


def _endpoint(url: str) -> frozenset[tuple[str, int]]:
    """The addresses and ports of the Hub that the operator has chosen; none if that is the usual one."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port or (80 if parts.scheme == "http" else 443)
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM) if parts.hostname else []
    except (OSError, ValueError):
        return frozenset()
    return frozenset((str(answer[4][0]), port) for answer in found)


def is_public(host: str) -> bool:
    """Whether `host` is the number of a host that everybody can reach. A name is not: it may lead anywhere."""
    try:
        number = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(number, ipaddress.IPv6Address):
        # These carry an IPv4 address: of a tunnel, or of a translator.
        inner = number.ipv4_mapped or number.sixtofour or number.teredo
        if inner is not None or number not in GLOBAL_UNICAST:
            return False
    return number.is_global and not number.is_multicast and not number.is_reserved


def problem_of(url: str) -> str | None:
    """Why a stranger's address is not taken, as the rest of a sentence; None if its host may be public."""
    if not re.fullmatch(r"[\x21-\x7e]+", url) or "\\" in url:
        return "holds characters that no address has. Fix: write it with % escapes"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return "is no address"
    if parts.scheme != "https":
        return "does not begin with https://, and only such addresses may be in a request"
    if "@" in parts.netloc:
        return "holds a login. Fix: use an address that needs none, such as a signed one"
    host = host.removesuffix(".")
    if is_public(host):
        return None
    if not _HOST.fullmatch(host) or _is_number(host) or host.rpartition(".")[2] in INSIDE:
        return "does not name a public host"
    return None


def _is_number(host: str) -> bool:
    """Whether the C library takes `host` for a number, as it does 127.1 and 0x7f.0.0.1."""
    try:
        socket.inet_aton(host)
    except OSError:
        return False
    return True
