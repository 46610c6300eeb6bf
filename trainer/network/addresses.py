"""What can be an address at all, and how an address is shown. Needs no library and no network.

An address comes from a variable, a document or a server. Libraries refuse odd ones with errors of six kinds, some only
when they connect; so each address is checked here first, once.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from trainer.spec.errors import SettingsError
from trainer.spec.plan import public
from trainer.spec.values import printable

SCHEMES = ("http", "https")
LONGEST = 8192  # characters; signed addresses have some 2,000
LABEL = re.compile(r"(?!-)[\w-]{1,63}(?<!-)")
LONGEST_HOST = 253
HUB = "https://huggingface.co"


def shown(address: str) -> str:
    """`address` for people: without the secrets that it may hold, on one line, and not too long."""
    try:
        return printable(public(address))
    except ValueError:
        return "an address that cannot be read"


def problem_of(address: str, *, schemes: tuple[str, ...] = SCHEMES) -> str | None:
    """What is wrong with `address`; None if it can be asked. Names are not looked up."""
    if len(address) > LONGEST:
        return f"it is longer than {LONGEST} characters"
    if not address.isprintable() or "\\" in address:
        return "it has a backslash or a control character"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "its host or port is not written as one"
    if parts.scheme not in schemes:
        return f"it does not begin with {' or '.join(f'{scheme}://' for scheme in schemes)}"
    if " " in parts.netloc:
        return "its host has a blank"
    if port == 0:
        return "no server listens on port 0"
    return _host_problem(host)


def host_of(address: str) -> str:
    """The host of an address in small letters; "" where it has none that can be read. It never raises."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _host_problem(host: str) -> str | None:
    if not host:
        return "it names no host"
    if ":" in host:  # in brackets, which urlsplit has removed
        try:
            ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            return "its host is no IPv6 address"
        return None
    try:
        ascii_host = host.encode("idna").decode("ascii").removesuffix(".")
    except UnicodeError:
        return "its host is no name of a machine"
    labels = ascii_host.split(".")
    if len(ascii_host) > LONGEST_HOST or not all(LABEL.fullmatch(label) for label in labels):
        return "its host is no name of a machine"
    if labels[-1].isdecimal():  # 1.2.3.999, which some libraries look up as a name
        try:
            ipaddress.IPv4Address(ascii_host)
        except ValueError:
            return "its host is no IPv4 address"
    return None


def hub_endpoint(environ: Mapping[str, str]) -> str:
    """The address of the Hub, or of the mirror that HF_ENDPOINT names. Raises SettingsError if that is none."""
    written = environ.get("HF_ENDPOINT", "").strip()
    address = written.rstrip("/") or HUB
    problem = problem_of(address)
    if problem is None and ("?" in address or "#" in address or "@" in address):
        problem = "it has more than a host, a port and a path"
    if problem is not None:
        raise SettingsError(
            f"HF_ENDPOINT={shown(written)}: {problem}. Write the address of a mirror like {HUB}, or unset it."
        )
    return address
