"""Any address of a file by https: what the server says of it, and its first bytes.

The first byte is asked for, and not the headers alone, because signed addresses refuse HEAD requests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from entrypoint.fetch import http
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.doors.offer import Offer, refusal
from entrypoint.fetch.http import RetryPolicy
from trainer.network import addresses
from trainer.spec.errors import SettingsError
from trainer.spec.values import as_integer
from trainer.storage.safe_names import is_safe

if TYPE_CHECKING:
    import httpx

SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"""(?i)filename\*=utf-8''([^;]+)|filename="([^"]+)"|filename=([^;"]+)""")


def ask(named: str, address: str, keys: Keys, *, retries: RetryPolicy) -> Offer:
    """What the server says of the file at `address`. Raises SettingsError, GatedError, UnreachableError."""
    return describe(named, address, headers_for(address, keys), retries=retries, key=key_for(address))


def key_for(address: str) -> str:
    """What gives access to a host, for messages."""
    host = urlsplit(address).netloc.rpartition("@")[2]
    if _is_of_the_hub(address):
        return "HF_TOKEN, and accept the conditions on the repository's page if it has any"
    return f"DOWNLOAD_TOKENS={host}=TOKEN"


def headers_for(address: str, keys: Keys) -> dict[str, str]:
    """The token of the host, and of no other."""
    if keys.hub and _is_of_the_hub(address):
        return {"Authorization": f"Bearer {keys.hub}"}
    return keys.for_host(address)


def _is_of_the_hub(address: str) -> bool:
    return address.startswith(f"{addresses.hub_endpoint(os.environ)}/")


def describe(named: str, url: str, headers: Mapping[str, str], *, retries: RetryPolicy, key: str) -> Offer:
    """`ask`, with these headers. `key`: what gives access there."""
    from trainer.network.client import open_client

    if problem := addresses.problem_of(url):
        raise SettingsError(f"{named}: {problem}. Correct the address.")
    with open_client(timeout=retries.timeout) as client:
        return http.persist(lambda: _asked(client, named, url, headers, key), what=named, retries=retries)


def _asked(client: httpx.Client, named: str, url: str, headers: Mapping[str, str], key: str) -> Offer:
    from trainer.network.client import CONTENT, Content

    first = {**headers, "Range": "bytes=0-0", "Accept-Encoding": "identity"}
    with client.stream("GET", url, headers=first, extensions={CONTENT: Content()}) as response:
        http.check_status(response, "the server")
        if response.status_code not in (200, 206) and not is_empty(response):
            raise refusal(named, response, key=key)
        if is_page(response):
            raise SettingsError(
                f"{named}: the address gives a web page, and not a file: it needs a login, or is a page about the "
                f"file. Use the address of the file itself, or set {key}."
            )
        length = response.headers.get("content-length" if response.status_code == 200 else "content-range", "")
        size = as_integer(length.rpartition("/")[2])
        version = response.headers.get("etag") or response.headers.get("last-modified")
        stated = [answer.headers.get("x-linked-etag", "").strip('W/"') for answer in (*response.history, response)]
        digest = next((text for text in stated if SHA256.fullmatch(text)), None)
        name = _name(url, response.headers.get("content-disposition", ""))
    return Offer(url, headers, name, size if size is not None and size >= 0 else None, digest, digest or version)


def is_empty(response: httpx.Response) -> bool:
    """Whether a server says that it cannot give the first byte of a file because there is none."""
    return response.status_code == 416 and response.headers.get("content-range", "").replace(" ", "") == "bytes*/0"


def is_page(response: httpx.Response) -> bool:
    """Whether an answer is a page to look at, and no file. A file may be a page too, and says so."""
    says_file = response.headers.get("content-disposition", "").strip().lower().startswith("attachment")
    return not says_file and response.headers.get("content-type", "").startswith("text/html")


def _name(url: str, disposition: str) -> str:
    """The name of the file: the server's, or the last part of the address; "file" where neither is one."""
    found = _FILE_NAME.search(disposition[:2000])
    said = unquote(found[1] or "") or found[2] or found[3] if found else ""
    for name in (said.strip(), unquote(PurePosixPath(urlsplit(url).path).name)):
        if name and is_safe(name) and "/" not in name and not name.startswith("."):
            return name
    return "file"
