"""Who may look: whoever has the token.

A browser changes it for a cookie; other programs send it with each request.

The token is in the part of the address after `#`, which no browser sends to any server: no log of a proxy has it. The
page sends it in the body of one request and gets a cookie, which is not the token: its digest, for this process alone.

Every comparison takes the same time, whatever was sent. Wrong tokens cost a place in a bucket that refills slowly;
where it is empty, the answer is 429, and nothing but a comparison is done for it. A right token is served all the same:
it is compared first. So nobody can lock its owner out, and how many wrong ones can be tried is of no use against a
token of 16 characters or more.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.requests import cookie_parser

PURPOSE = b"kiln monitor cookie"
BEARER = "bearer "


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
    """What one server asks of those who look. `port` tells the cookies of servers on one host apart.

    A cookie is for this process alone: jobs with the same MONITOR_TOKEN do not take each other's.
    """

    def __init__(self, token: str, *, port: int, bucket: Bucket | None = None) -> None:
        self._token = token.encode()
        self.cookie_name = f"kiln_monitor_{port}"
        self.cookie = hmac.new(self._token, PURPOSE + secrets.token_bytes(32), hashlib.sha256).hexdigest()
        self.bucket = bucket or Bucket()

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(self._token, text.encode("utf-8", "surrogatepass"))

    def allows(self, headers: Mapping[str, str]) -> bool | None:
        """Whether a request may be served; None where it has nothing to show."""
        shown = headers.get("authorization", "")
        if shown[: len(BEARER)].lower() == BEARER:
            return self.is_token(shown[len(BEARER) :].strip())
        # Not http.cookies, which gives up at the first odd one: programs on all ports of localhost share their cookies.
        cookie = cookie_parser(headers.get("cookie", "")).get(self.cookie_name)
        if cookie is None:
            return None
        return hmac.compare_digest(self.cookie.encode(), cookie.encode("utf-8", "surrogatepass"))


def is_from_another_site(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site has sent a request that changes something.

    Browsers say so themselves (Fetch Metadata), and that alone decides: a proxy may ask for another host than they did.
    Older ones name the origin, which must be the host that was asked.
    """
    fetch = headers.get("sec-fetch-site")
    if fetch is not None:
        return fetch not in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return False
    asked = {headers.get(name, "").strip().lower() for name in ("host", "x-forwarded-host")}
    return urlsplit(origin).netloc.lower() not in asked - {""}
