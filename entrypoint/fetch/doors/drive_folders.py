"""Folders that Google Drive shares with anyone who has the link.

Drive's list of a folder is a page for browsers (the one for embedding in other pages): an entry for each file and each
folder in it, with a link and a title, and without sizes. Each file then comes as one that is shared by itself
(`shares`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode, urlsplit

from entrypoint.fetch import http
from entrypoint.fetch.doors.offer import refusal
from entrypoint.fetch.doors.shares import DRIVE_HOSTS, KEY, is_login
from entrypoint.fetch.http import RetryPolicy
from trainer.network import addresses
from trainer.network.errors import TransientError
from trainer.spec.errors import DataError, GatedError, SettingsError
from trainer.spec.values import printable, some
from trainer.storage.safe_names import Names, is_safe

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)
LISTS = "https://drive.google.com/embeddedfolderview"
UNKNOWN = -1  # bytes
MOST_FILES, MOST_FOLDERS, DEEPEST = 20_000, 500, 16
PACK = "Pack them into an archive, and share that."
PAGE_BYTES = 2**25  # of a list; an entry has less than 1 KB
_FOLDER = re.compile(r"/drive(?:/u/\d+)?/folders/([\w-]{10,100})/?")
_LINKED_FOLDER = re.compile(r"https://drive\.google\.com/drive/(?:u/\d+/)?folders/([\w-]{10,100})")
_RESOURCE_KEY = re.compile(r"[\w-]{1,100}")
_LINKED_FILE = re.compile(r"https://drive\.google\.com/(?:a/[^/]+/)?file/(?:u/\d+/)?d/([\w-]{10,100})")


def is_one(text: str) -> bool:
    return "://" in text and addresses.host_of(text) in DRIVE_HOSTS and "/folders/" in urlsplit(text).path


def number_of(named: str, text: str) -> str:
    """Raises SettingsError, with the fix."""
    found = _FOLDER.fullmatch(urlsplit(text).path)
    if found is None:
        raise SettingsError(
            f"{named} is not written as https://drive.google.com/drive/folders/ID. Copy the link again."
        )
    return found[1]


def link_of(version: str) -> str:
    """The link that shares a file that `listed` has given."""
    number, question, key = version.partition("?")
    return f"https://drive.google.com/file/d/{number}/view{question}{key}"


def key_in(link: str) -> str:
    """The resource key of a link, as a query; "": it has none. What was shared before 2021 may be closed without it."""
    found = parse_qs(urlsplit(link).query).get("resourcekey", [""])[0]
    return f"resourcekey={found}" if _RESOURCE_KEY.fullmatch(found) else ""


def listed(named: str, text: str, *, retries: RetryPolicy) -> Iterator[tuple[str, int, str]]:
    """Names, UNKNOWN and numbers (with their resource keys) of all files in a folder and those below it.

    Documents of Google's own are no files: a warning names them. Each list is asked for until it comes. Raises
    GatedError (it is not shared), SettingsError, UnreachableError.
    """
    from trainer.network.client import open_client

    names, others = Names(), list[str]()
    waiting, seen = [("", number_of(named, text), key_in(text), 0)], set[str]()
    count = 0
    with open_client(timeout=retries.timeout) as client:
        while waiting:
            above, number, key, depth = waiting.pop()
            if number in seen:  # a folder may be in several
                continue
            seen.add(number)
            if len(seen) > MOST_FOLDERS or depth > DEEPEST:
                raise SettingsError(f"{named}: more than {MOST_FOLDERS} folders, or {DEEPEST} in each other. {PACK}")
            asked = partial(_asked, named, client, number, key)
            for title, link in http.persist(asked, what=named, retries=retries):
                name = f"{above}{title}"
                folder, file = _LINKED_FOLDER.match(link), _LINKED_FILE.match(link)
                if folder is None and file is None:  # no file here will have its title
                    others.append(name)
                    continue
                if "/" in title or not is_safe(title):
                    raise SettingsError(f"{named}: {printable(name)} cannot be the name of a file. Rename it there.")
                if folder is not None:
                    waiting.append((f"{name}/", folder[1], key_in(link), depth + 1))
                elif file is not None:
                    count += 1
                    if count > MOST_FILES:
                        raise SettingsError(f"{named}: more than {MOST_FILES:,} files. {PACK}")
                    _add(named, names, name)
                    yield name, UNKNOWN, f"{file[1]}?{key_in(link)}".rstrip("?")
    if others:
        log.warning("%s: left out, since they are no files: %s.", named, some(others))


def _add(named: str, names: Names, name: str) -> None:
    try:
        names.add(name, folder=False)
    except DataError as problem:
        raise SettingsError(f"{named}: {printable(str(problem))}. Rename it in Google Drive.") from problem


def _asked(named: str, client: httpx.Client, number: str, key: str) -> list[tuple[str, str]]:
    """Titles and links of the entries of a folder, by one try."""
    return _entries(named, _page(named, client, number, key))


def _page(named: str, client: httpx.Client, number: str, key: str) -> str:
    """The list of a folder."""
    from trainer.network.client import CONTENT, Content

    url = f"{LISTS}?{urlencode({'id': number})}&{key}".rstrip("&")
    with client.stream("GET", url, extensions={CONTENT: Content()}) as response:
        http.check_status(response, "Google Drive")
        if is_login(response) or response.status_code in (401, 403):
            raise GatedError(f"{named}: Google Drive asks for a login: the folder is not shared. Set {KEY}.")
        if response.status_code == 404:
            raise SettingsError(f"{named}: Google Drive has no such folder, or it is not shared. Set {KEY}.")
        if response.status_code != 200:
            raise refusal(named, response, key=KEY)
        data = b""
        for block in response.iter_bytes():
            data += block
            if len(data) > PAGE_BYTES:
                raise SettingsError(f"{named}: the list of a folder is too long. {PACK}")
    return data.decode("utf-8", "replace")


class _List(HTMLParser):
    """Titles and links of the entries of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[str, str]] = []
        self.is_list = False  # an empty one is marked, too
        self.announced = 0
        self._link = ""
        self._title: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        classes = (own.get("class") or "").split()
        if "flip-entries" in classes or "flip-entry" in classes:
            self.is_list = True
        if "flip-entry" in classes:
            self.announced += 1
        if tag == "a":
            self._link = own.get("href") or ""
        if "flip-entry-title" in classes:
            self._title = ""

    def handle_data(self, data: str) -> None:
        if self._title is not None:
            self._title += data

    def handle_endtag(self, tag: str) -> None:
        if self._title is not None and tag == "div":
            self.entries.append((self._title.strip(), self._link))
            self._title = None


def _entries(named: str, page: str) -> list[tuple[str, str]]:
    """Raises GatedError for the page of a login, TransientError for any other that is no list, or not all of one.

    What is no list must never count as an empty one: images would be missing without a word.
    """
    reader = _List()
    reader.feed(page)
    if not reader.is_list and re.search(r"(?i)sign in|need access|ServiceLogin", page):
        raise GatedError(f"{named}: Google Drive asks for a login: the folder is not shared. Set {KEY}.")
    if not reader.is_list:
        raise TransientError("the answer is no list of a folder")
    if len(reader.entries) != reader.announced:
        raise TransientError(f"the list has {reader.announced} entries, and names {len(reader.entries)} of them")
    return reader.entries
