"""Files in buckets of the Hub: hf://buckets/OWNER/BUCKET/PATH. They have neither commits nor branches.

One file is an address of the Hub like any other (`web`, with HF_TOKEN); what is below a name is listed page by page.
What is asked follows huggingface_hub's own client (`HfApi.list_bucket_tree`, `HfFileSystem`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from entrypoint.fetch import http
from entrypoint.fetch.doors.offer import refusal
from entrypoint.fetch.http import RetryPolicy
from trainer.network import addresses
from trainer.network.errors import TransientError
from trainer.spec.errors import DataError, SettingsError
from trainer.spec.values import printable
from trainer.storage.safe_names import Names

if TYPE_CHECKING:
    import httpx

SCHEME = "hf://buckets/"
KEY = "HF_TOKEN to a token that may read the bucket"
MOST_FILES = 200_000  # below one name, as in an archive
MOST_PAGES = 2000  # the Hub gives a thousand files or so in each
TOO_MANY = f"more than {MOST_FILES:,} files. Pack them into archives."
_PLACE = re.compile(r"(?i)hf://buckets/([\w.-]{1,96}/[\w.-]{1,96})(?:/(.*))?", re.DOTALL)


@dataclass(frozen=True)
class HubPlace:
    """A file, or all below a name, in a bucket (`owner/name`)."""

    bucket: str
    path: str

    @property
    def page(self) -> str:
        return f"{addresses.hub_endpoint(os.environ)}/buckets/{self.bucket}"

    def below(self, name: str) -> HubPlace:
        before = self.path.strip("/")
        return HubPlace(self.bucket, f"{before}/{name}" if before else name)

    @property
    def address(self) -> str:
        """From which the file comes."""
        return f"{self.page}/resolve/{quote(self.path)}"


def is_one(text: str) -> bool:
    return text.lower().startswith(SCHEME)


def parse(named: str, text: str) -> HubPlace:
    """Raises SettingsError, with the fix."""
    found = _PLACE.fullmatch(text)
    if found is None or re.search(r"[?#@]", text) or ".." in text.split("/"):
        raise SettingsError(f"{named} is not written as {SCHEME}OWNER/BUCKET/PATH. Correct it.")
    return HubPlace(found[1], found[2] or "")


def listed(named: str, place: HubPlace, token: str | None, *, retries: RetryPolicy) -> Iterator[tuple[str, int, str]]:
    """Names, bytes and hashes of all files below a name. Each page is asked for until it comes.

    Raises GatedError, SettingsError, UnreachableError.
    """
    from trainer.network.client import open_client

    endpoint = addresses.hub_endpoint(os.environ)
    prefix = place.path.strip("/")
    below = f"/{quote(prefix, safe='')}" if prefix else ""
    url: str | None = f"{endpoint}/api/buckets/{place.bucket}/tree{below}?recursive=true"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    names, count = Names(), 0
    with open_client(timeout=retries.timeout) as client:
        for _ in range(MOST_PAGES):
            if url is None:
                return
            asked = partial(_page, named, client, url, headers, f"{endpoint}/api/buckets/{place.bucket}/")
            entries, url = http.persist(asked, what=named, retries=retries)
            for entry in entries:
                name, size, version = _file(named, entry, prefix)
                count += 1
                if count > MOST_FILES:
                    raise SettingsError(f"{named}: {TOO_MANY}")
                try:
                    names.add(name, folder=False)
                except DataError as problem:
                    raise SettingsError(f"{named}: {printable(str(problem))}. Rename it in the bucket.") from problem
                yield name, size, version
    raise SettingsError(f"{named}: {TOO_MANY}")


def _page(
    named: str, client: httpx.Client, url: str, headers: Mapping[str, str], beginning: str
) -> tuple[list[Any], str | None]:
    """What a page lists, and the address of the next one, by one try."""
    answer = client.get(url, headers=headers)
    return _entries(named, answer), _next(named, answer, beginning)


def _entries(named: str, answer: httpx.Response) -> list[Any]:
    """What a page lists that is no folder."""
    http.check_status(answer, "the Hub")
    if answer.status_code == 404:
        raise SettingsError(
            f"{named}: there is no such bucket, or HF_TOKEN may not see it. Check its name, or set {KEY}."
        )
    if answer.status_code >= 400:
        raise refusal(named, answer, key=KEY)
    found = http.parse_json(answer, "the Hub")
    if not isinstance(found, list):
        raise TransientError("the answer is no list of files")
    return [entry for entry in found if not (isinstance(entry, dict) and entry.get("type") == "directory")]


def _file(named: str, entry: Any, prefix: str) -> tuple[str, int, str]:
    """Name below the prefix, bytes and hash. Raises SettingsError for what cannot be a file."""
    path, size, digest = (entry.get(key) if isinstance(entry, dict) else None for key in ("path", "size", "xetHash"))
    if not isinstance(path, str) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise SettingsError(
            f"{named}: the Hub lists what is no file ({printable(str(entry)[:100])}). Start again later."
        )
    if path == prefix:
        return PurePosixPath(path).name, size, str(digest)
    if prefix and not path.startswith(f"{prefix}/"):
        raise SettingsError(f"{named}: the Hub lists {printable(path)}, which is not below {printable(prefix)}.")
    return path[len(prefix) :].lstrip("/") if prefix else path, size, str(digest)


def _next(named: str, answer: httpx.Response, beginning: str) -> str | None:
    """The address of the next page; None after the last. Raises SettingsError for one of something else."""
    link = answer.links.get("next", {}).get("url")
    if link is None:
        return None
    url = str(answer.url.join(link))
    if not url.startswith(beginning):
        raise SettingsError(f"{named}: the Hub's list goes on elsewhere ({addresses.shown(url)}). Start again later.")
    return url
