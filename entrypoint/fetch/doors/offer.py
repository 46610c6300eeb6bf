"""A file behind an address, as its service describes it, and why a service refuses one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.network.errors import HopelessError, TransientError
from trainer.spec.errors import GatedError, KilnError, SettingsError, UnreachableError
from trainer.spec.values import printable

if TYPE_CHECKING:
    import httpx

# Storage services give their reason as XML; the names are those of S3, which others have taken over.
_CODE = re.compile(r"<(?:Code|Error)>\s*([A-Za-z]{1,60})\s*</")
_EXPIRED = re.compile(
    r"(?i)request has expired|<Code>ExpiredToken|expired token|signature not valid in the specified time"
)
READ_BYTES = 20_000  # of a refusal


@dataclass(frozen=True)
class Offer:
    """`version` changes with the content (an ETag or a date); None: the server gives none. `url` may be signed."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # of a request; may hold a token
    name: str = "file"  # safe as the name of a file
    size: int | None = None  # bytes
    digest: str | None = None  # SHA-256 that the service states
    version: str | None = None


def refusal(named: str, response: httpx.Response, *, key: str, writes: bool = False) -> KilnError:
    """The error for a refusal. `named`: the variable with its value; `key`: what gives access; `writes`: for a PUT."""
    status = response.status_code
    said = _said(response)
    code = response.headers.get("x-ms-error-code", "") or next(iter(_CODE.findall(said)), "")
    reason = f"{status} {printable(code)}".rstrip()
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return SettingsError(
            f"{named}: there is no such bucket ({reason}). Check its name, the endpoint and the region."
        )
    if status in (404, 410):
        return SettingsError(f"{named}: the server has no such file ({reason}). Check the address.")
    if status in (400, 401, 403) and _EXPIRED.search(said):
        return GatedError(f"{named}: its signature has expired ({reason}). Make a new signed address.")
    if code in ("RequestTimeTooSkewed", "SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken"):
        return GatedError(f"{named}: the key is not accepted ({reason}). Copy it again{_clock(code)}: {key}.")
    if status == 401:
        return GatedError(f"{named}: the server asks for a login (401). Set {key}.")
    if status in (402, 413, 507) or code in ("EntityTooLarge", "QuotaExceeded", "AccountBeingCreated"):
        return GatedError(f"{named}: the service takes no more ({reason}). Free storage there, or name another place.")
    if status == 403 and writes:
        why = "the key may not, or a signature has expired"
        return GatedError(f"{named}: nothing may be written there ({reason}): {why}. Set {key}.")
    if status == 403:
        return GatedError(
            f"{named}: the server forbids it ({reason}): it is not public, a signature has expired, or the key may "
            f"not read it. Set {key}, or make a new signed address."
        )
    if status in (301, 307, 400) and code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "TemporaryRedirect"):
        return SettingsError(f"{named}: the bucket is in another region ({reason}). Set AWS_REGION to the bucket's.")
    return SettingsError(f"{named}: the server refuses it ({reason}). Check the address.")


def _said(response: httpx.Response) -> str:
    """The beginning of what the server says; it is only searched, and never shown."""
    try:
        data = response.content if response.is_stream_consumed else response.read()
    except (HopelessError, TransientError, UnreachableError, OSError, RuntimeError):
        return ""
    return data[:READ_BYTES].decode("utf-8", "replace")


def _clock(code: str) -> str:
    return ", and check the clock of this machine" if code == "RequestTimeTooSkewed" else ""
