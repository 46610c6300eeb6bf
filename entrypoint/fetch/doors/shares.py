"""Links by which people share a file: of Google Drive and Dropbox, whose pages are for browsers.

Drive shows a page in the place of a large file, which warns that nothing looked for viruses in it; the page has a form,
and its fields are what gives the file. Drive also has a quota for each file, which others may have used up.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

from entrypoint.fetch import http
from entrypoint.fetch.doors import web
from entrypoint.fetch.doors.offer import Offer, refusal
from entrypoint.fetch.http import RetryPolicy
from trainer.network import addresses
from trainer.spec.errors import GatedError, SettingsError, UnreachableError

if TYPE_CHECKING:
    import httpx

DRIVE = "https://drive.usercontent.google.com/download"
DRIVE_HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")
DROPBOX_HOSTS = ("dropbox.com", "www.dropbox.com", "dl.dropboxusercontent.com")
PAGE_BYTES = 2**20  # of the page with the warning; it has some 3 KB
KEY = "its access to 'anyone with the link'"
_ID = re.compile(r"[\w-]{10,100}")


def is_one(text: str) -> bool:
    return "://" in text and addresses.host_of(text) in (*DRIVE_HOSTS, *DROPBOX_HOSTS)


def identity(text: str) -> str:
    """The same for all links to one file."""
    parts = urlsplit(text)
    if (parts.hostname or "").lower() in DRIVE_HOSTS:
        return f"drive:{_drive_id(text)}"
    return f"dropbox:{parts.path}"


def ask(named: str, text: str, *, retries: RetryPolicy) -> Offer:
    """The file behind a link. Raises SettingsError, GatedError (it is not shared), UnreachableError (a quota)."""
    if (urlsplit(text).hostname or "").lower() in DROPBOX_HOSTS:
        return _dropbox(named, text, retries=retries)
    number = _drive_id(text)
    if number is None:
        raise SettingsError(
            f"{named} is no link to one file of Google Drive. Fix: share the file itself (of a folder, make an "
            "archive), and copy its link."
        )
    fields = {"id": number, "export": "download", "confirm": "t"}
    key = parse_qs(urlsplit(text).query).get("resourcekey")
    if key:
        fields["resourcekey"] = key[0]
    url = f"{DRIVE}?{urlencode(fields)}"
    page = _page(named, url, retries=retries)
    if page is not None:
        url = f"{DRIVE}?{urlencode(_form(named, page, fields))}"
        if _page(named, url, retries=retries) is not None:
            raise _not_shared(named, page)
    return web.describe(named, url, {}, retries=retries, key=KEY)


def _dropbox(named: str, text: str, *, retries: RetryPolicy) -> Offer:
    parts = urlsplit(text)
    query = {name: values[0] for name, values in parse_qs(parts.query).items() if name not in ("dl", "raw")}
    url = urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode({**query, "dl": "1"}), ""))
    if _page(named, url, retries=retries) is not None:
        raise GatedError(f"{named}: Dropbox shows a page in the place of the file. Set {KEY}, and copy the link again.")
    return web.describe(named, url, {}, retries=retries, key=KEY)


def _drive_id(text: str) -> str | None:
    parts = urlsplit(text)
    found = re.match(r"/(?:a/[^/]+/)?(?:file|uc)/(?:u/\d+/)?d/([\w-]+)", parts.path)
    number = found[1] if found else parse_qs(parts.query).get("id", [""])[0]
    if "/folders/" in parts.path or not _ID.fullmatch(number):
        return None
    return number


def _page(named: str, url: str, *, retries: RetryPolicy) -> str | None:
    """The web page at `url`; None if a file is there. Raises for refusals."""
    from trainer.network.client import CONTENT, Content, open_client

    def call() -> str | None:
        first = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        with client.stream("GET", url, headers=first, extensions={CONTENT: Content()}) as response:
            http.check_status(response, "the service")
            if is_login(response):
                raise GatedError(f"{named}: the service asks for a login: the file is not shared. Set {KEY}.")
            if web.is_empty(response):
                return None
            if response.status_code not in (200, 206):
                raise refusal(named, response, key=KEY)
            if not web.is_page(response):
                return None
            data = b""
            for block in response.iter_raw():
                data += block
                if len(data) > PAGE_BYTES:
                    break
        return data.decode("utf-8", "replace")

    # One byte of a page is asked for, and servers give all of it: a page that was cut short is asked for anew.
    with open_client(timeout=retries.timeout) as client:
        return http.persist(call, what=named, retries=retries)


def is_login(response: httpx.Response) -> bool:
    host = response.url.host
    return host == "accounts.google.com" or response.url.path.startswith(("/ServiceLogin", "/login"))


class _Fields(HTMLParser):
    """The hidden fields of the forms of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        if tag == "input" and own.get("type") == "hidden" and own.get("name"):
            self.found[str(own["name"])] = own.get("value") or ""


def _form(named: str, page: str, fields: dict[str, str]) -> dict[str, str]:
    """What the page asks to be sent, to the same place. Raises GatedError where it is another page."""
    reader = _Fields()
    reader.feed(page)
    known = {name: value for name, value in reader.found.items() if re.fullmatch(r"[\w-]{1,20}", name)}
    if known.get("id") != fields["id"] or "confirm" not in known:
        raise _not_shared(named, page)
    return {**fields, **known}


def _not_shared(named: str, page: str) -> Exception:
    if re.search(r"(?i)quota|too many users have viewed or downloaded", page):
        return UnreachableError(
            f"{named}: too many people have downloaded this file, and Google Drive's quota for it is used up. Start "
            "again in a day, or make a copy of the file in your own Drive and share that."
        )
    return GatedError(
        f"{named}: the service shows a page in the place of the file. Set {KEY}, and copy the link again."
    )
