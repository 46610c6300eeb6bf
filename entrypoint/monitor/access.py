"""Where the page is, and who may look: whoever has the token.

A browser changes it for a cookie; other programs send it with each request.

The token is in the part of the address after `#`, which no browser sends to any server: no log of a proxy has it. The
page sends it in the body of one request and gets a cookie, which is not the token: its digest, for this server alone.

Every comparison takes the same time, whatever was sent. Wrong tokens cost a place in a bucket that refills slowly;
where it is empty, the answer is 429, and nothing but a comparison is done for it. A right token is served all the same:
it is compared first. So nobody can lock its owner out, and how many wrong ones can be tried is of no use against a
token of 16 characters or more.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

PORT = 8675  # MONITOR_PORT
SHORTEST_TOKEN = 16  # characters of MONITOR_TOKEN: more than anybody can try
PURPOSE = b"kiln monitor cookie"
BEARER = "bearer "


def page_address(environment: Mapping[str, str], *, port: int, token: str = "") -> str:
    """The address of the page on this machine; on RunPod, that of its proxy. `token`: where it may be shown."""
    pod = environment.get("RUNPOD_POD_ID", "").strip()
    place = f"https://{pod}-{port}.proxy.runpod.net/" if pod else f"http://localhost:{port}/"
    return f"{place}#{token}" if token else place


@dataclass
class Bucket:
    """`most` wrong answers at once, then `per_second`. `clock`: in seconds."""

    most: float = 20.0
    per_second: float = 1.0
    clock: Callable[[], float] = time.monotonic
    left: float = field(init=False)
    looked: float = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.most
        self.looked = self.clock()

    def take(self) -> bool:
        """Whether there was a place left; takes it."""
        now = self.clock()
        self.left = min(self.most, self.left + (now - self.looked) * self.per_second)
        self.looked = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Access:
    """What one server asks of those who look. `port` tells the cookies of servers on one host apart."""

    def __init__(self, token: str, *, port: int, bucket: Bucket | None = None) -> None:
        self._token = token.encode()
        self.cookie_name = f"kiln_monitor_{port}"
        self.cookie = hmac.new(self._token, PURPOSE, hashlib.sha256).hexdigest()
        self.bucket = bucket or Bucket()

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(self._token, text.encode("utf-8", "surrogatepass"))

    def allows(self, headers: Mapping[str, str]) -> bool | None:
        """Whether a request may be served; None where it has nothing to show."""
        shown = headers.get("authorization", "")
        if shown[: len(BEARER)].lower() == BEARER:
            return self.is_token(shown[len(BEARER) :].strip())
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return None
        if self.cookie_name not in cookies:
            return None
        return hmac.compare_digest(self.cookie.encode(), cookies[self.cookie_name].value.encode())


def is_from_another_site(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site has sent a request that changes something.

    Browsers say so themselves (Fetch Metadata); older ones name the origin, which must be the host that was asked.
    """
    fetch = headers.get("sec-fetch-site")
    if fetch is not None and fetch not in ("same-origin", "none"):
        return True
    origin = headers.get("origin")
    if origin is None:
        return False
    asked = {headers.get(name, "").strip().lower() for name in ("host", "x-forwarded-host")}
    return urlsplit(origin).netloc.lower() not in asked - {""}
