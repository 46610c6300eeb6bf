"""One .safetensors file behind an address, on its way into the cache.

`announce` asks for the file and reads its header, which decides the plan: what is in the file, whether it fits, how
large it is. Until `bring` has brought all of it, its place holds an outline: the same header, marked, and a hole of the
right size, which takes no room. So everything that reads headers before the download reads them there.

A place is named by the address without its signature, and by what the service says of the content (its SHA-256, or its
version), so that a job finds the file again, and a file that has changed is another one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoint.fetch import http
from entrypoint.fetch.doors import service
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.doors.offer import Offer, refusal
from entrypoint.fetch.http import RetryPolicy
from trainer.base_model import model_folder
from trainer.spec.errors import GatedError, SettingsError, UnreachableError
from trainer.storage import atomic
from trainer.storage.folders import locked, naming, read_json, storage_error, write_text
from trainer.storage.safe_names import is_safe
from trainer.storage.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, check_layout, parse_header

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
MARK = "kiln_outline"  # in the header of an outline
SUFFIX = ".safetensors"
USUAL_HEADER = 2**19  # bytes: longer headers take a second question
RECORD = "known.json"
LARGEST_FILE = 2**50  # bytes
PATIENCE_S = 10.0  # for a silent server, where the file is here


@dataclass(frozen=True)
class Arrival:
    """A file that a variable names. `path` holds it, or its outline where `offer` says that it is still to come."""

    variable: str
    named: str  # the variable with its value, without secrets
    path: Path
    offer: Offer | None = field(default=None, repr=False)
    key: str = ""  # what gives access, for messages

    @property
    def missing_bytes(self) -> int:
        if self.offer is None:
            return 0
        part = _part(self.path)
        return max(0, (self.offer.size or 0) - (part.stat().st_size if part.is_file() else 0))


def announce(variable: str, named: str, text: str, keys: Keys, *, cache: Path, retries: RetryPolicy) -> Arrival:
    """The file that `text` names, or its outline.

    Raises SettingsError (nothing there, or no .safetensors file), GatedError, UnreachableError, StorageError.
    """
    place = cache / "files" / hashlib.sha256(service.identity(text).encode()).hexdigest()[:16]
    key = service.key_for(text)
    here = _complete(place)
    try:
        policy = replace(retries, budget=min(PATIENCE_S, retries.budget)) if here else retries
        offer = service.ask(named, text, keys, retries=policy)
    except (UnreachableError, GatedError) as problem:
        if here is None:
            raise
        logger.warning("%s The cache has the file from before: using that.", problem)
        return Arrival(variable, named, here)
    record = read_json(place / RECORD) or {}
    if here is not None and offer.version is not None and record.get("version") == offer.version:
        return Arrival(variable, named, here)
    if foreign := model_folder.foreign_problem(offer.name):
        raise SettingsError(f"{named}: {offer.name} {foreign}.")
    raw = _header_of(named, offer, key, retries=retries)
    size = _whole_size(named, raw)
    if offer.size is not None and offer.size != size:
        raise SettingsError(
            f"{named}: the server has {offer.size:,} bytes of it, and its header tells of {size:,}: it was cut short "
            "or is damaged. Name another file, or upload it again."
        )
    offer = replace(offer, size=size)
    name = offer.name if offer.name.lower().endswith(SUFFIX) else f"{offer.name}{SUFFIX}"
    content = hashlib.sha256((offer.version or raw.hex()).encode()).hexdigest()[:12]
    path = place / content / name
    if not (path.is_file() and is_outline(path)):
        with naming("CACHE_PATH"):
            _write_outline(path, raw, size)
    return Arrival(variable, named, path, offer, key)


def bring(arrival: Arrival, *, retries: RetryPolicy) -> None:
    """Download what is missing of a file, compare it with what was announced, and put it in the outline's place.

    Raises SettingsError, GatedError, UnreachableError, StorageError.
    """
    from trainer.network.client import open_client

    offer, path = arrival.offer, arrival.path
    if offer is None:
        return
    place = path.parent.parent
    with naming("CACHE_PATH"), locked(place / "lock"), open_client(timeout=retries.timeout) as client:
        if _complete(place) == path:
            return  # another job was faster
        job = http.Download(
            offer.url,
            path,
            _part(path),
            arrival.named,
            offer.headers,
            offer.size,
            offer.digest,
            version=None if offer.digest else offer.version,
        )
        digest = http.download(client, job, retries=retries, refuse=partial(_refuse, arrival))
        try:
            check_layout(parse_header(path))
        except ValueError as problem:
            path.unlink(missing_ok=True)
            raise SettingsError(f"{arrival.named} is damaged: {problem}. Name another file.") from problem
        found = path.stat()
        record = {"file": f"{path.parent.name}/{path.name}", "stamp": [found.st_size, found.st_mtime_ns]}
        write_text(place / RECORD, json.dumps({**record, "version": offer.version, "sha256": digest}))
    how = "and has the SHA-256 that was announced" if offer.digest else "whole by its header and its length"
    logger.info("%s is here, %s (SHA-256 %s…).", arrival.named, how, digest[:12])


def is_outline(path: Path) -> bool:
    """Whether a file is only the outline of one that was never brought."""
    try:
        return MARK in parse_header(path).metadata
    except (OSError, ValueError):
        return False


def _refuse(arrival: Arrival, response: httpx.Response) -> None:
    raise refusal(arrival.named, response, key=arrival.key)


def _part(path: Path) -> Path:
    return path.parent.parent / f"{path.parent.name}.part"


def _complete(place: Path) -> Path | None:
    """The file that is here, as `bring` left it."""
    record = read_json(place / RECORD) or {}
    name = record.get("file")
    if not isinstance(name, str) or not is_safe(name):
        return None
    path = place / name
    try:
        found = path.stat()
    except OSError:
        return None
    return path if record.get("stamp") == [found.st_size, found.st_mtime_ns] else None


# ---- headers


def _header_of(named: str, offer: Offer, key: str, *, retries: RetryPolicy) -> bytes:
    """The bytes of a safetensors file up to its tensors. Raises SettingsError for another file."""
    begin = _first_bytes(named, offer, key, USUAL_HEADER, retries=retries)
    length = LENGTH_BYTES + int.from_bytes(begin[:LENGTH_BYTES], "little")
    is_one = begin[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and length <= MAX_HEADER_BYTES
    if is_one and length > len(begin):
        begin = _first_bytes(named, offer, key, length, retries=retries)
    if not is_one or len(begin) < length:
        raise SettingsError(f"{named} {_what_it_is(begin)}.")
    return begin[:length]


def _what_it_is(begin: bytes) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "begin.safetensors"
        file.write_bytes(begin[:4096])
        problem = model_folder.damage(file)
    return problem or "is no .safetensors file"


def _first_bytes(named: str, offer: Offer, key: str, count: int, *, retries: RetryPolicy) -> bytes:
    """At most `count` bytes from the beginning of a file."""
    from trainer.network.client import CONTENT, Content, open_client

    headers = {**offer.headers, "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}

    def call() -> bytes:
        data = b""
        with client.stream("GET", offer.url, headers=headers, extensions={CONTENT: Content()}) as response:
            http.check_status(response, "the server")
            if response.status_code not in (200, 206):
                raise refusal(named, response, key=key)
            for block in response.iter_raw():
                data += block
                if len(data) >= count:
                    break
        return data[:count]

    with open_client(timeout=retries.timeout) as client:
        return http.persist(call, what=named, retries=retries)


def _whole_size(named: str, raw: bytes) -> int:
    """The length of a whole file with this header. Raises SettingsError for a damaged one."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "header.safetensors"
        file.write_bytes(raw)
        try:
            header = parse_header(file, size=LARGEST_FILE)
        except ValueError as problem:
            raise SettingsError(f"{named} is damaged: {problem}. Name another file.") from problem
    return max((entry.end for entry in header.entries.values()), default=len(raw))


def _write_outline(path: Path, raw: bytes, size: int) -> None:
    tree = json.loads(raw[LENGTH_BYTES:])
    tree["__metadata__"] = {**tree.get("__metadata__", {}), MARK: "not downloaded yet"}
    text = json.dumps(tree).encode()
    try:
        with atomic.replacing(path, shared=True) as temporary:
            temporary.write_bytes(len(text).to_bytes(LENGTH_BYTES, "little") + text)
            os.truncate(temporary, LENGTH_BYTES + len(text) + size - len(raw))
    except OSError as problem:
        raise storage_error(problem, path) from problem
