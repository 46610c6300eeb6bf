"""One .safetensors file behind an address, on its way into the cache.

`announce` asks for the file and reads its header, which decides the plan: what is in the file, whether it fits, how
large it is. Until `bring` has brought all of it, its place holds an outline: the same header, marked, and a hole of the
right size, which takes no room. So everything that reads headers before the download reads them there.

A place is named by the address without its signature, and by what the service says of the content (its SHA-256, or its
version), so that a job finds the file again, and a file that has changed is another one. Of a content about which the
service says nothing, the first bytes count, of the header and of the first tensors.

An outline never takes the place of a whole file, and whoever loads weights refuses one
(`safetensors_header.check_is_here`).
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
from trainer.storage import atomic, digests, json_files
from trainer.storage.folders import locked, naming, read_json, storage_error, write_text
from trainer.storage.read import open_regular
from trainer.storage.safe_names import is_safe
from trainer.storage.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    OUTLINE,
    check_is_here,
    check_layout,
    parse_header,
)

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
SUFFIX = ".safetensors"
LONGEST_STEM = 180  # bytes of a name: the suffix, and what a temporary file adds, must fit into 255 too
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
    here, _ = _known(place)
    try:
        policy = replace(retries, budget=min(PATIENCE_S, retries.budget)) if here else retries
        offer = service.ask(named, text, keys, retries=policy)
    except (UnreachableError, GatedError) as problem:
        if here is None:
            raise
        logger.warning("%s The cache has the file from before: using that.", problem)
        return Arrival(variable, named, here)
    here, version = _known(place)  # again: another job may have brought it in the meantime
    if here is not None and offer.version is not None and version == offer.version:
        return Arrival(variable, named, here)
    if foreign := model_folder.foreign_problem(offer.name):
        raise SettingsError(f"{named}: {offer.name} {foreign}.")
    begin, raw = _beginning_of(named, offer, key, retries=retries)
    size = _whole_size(named, raw)
    if offer.size is not None and offer.size != size:
        raise SettingsError(
            f"{named}: the server has {offer.size:,} bytes of it, and its header tells of {size:,}: it was cut short "
            "or is damaged. Name another file, or upload it again."
        )
    offer = replace(offer, size=size)
    content = hashlib.sha256(offer.version.encode() if offer.version else begin).hexdigest()[:12]
    path = place / content / _file_name(offer.name)
    if is_outline(path):
        return Arrival(variable, named, path, offer, key)
    with naming("CACHE_PATH"), locked(place / "lock"):
        if _is_whole(path, offer, begin):
            _remember(path, offer)
            return Arrival(variable, named, path)
        if not is_outline(path):
            json_files.set_aside_unless(path, lambda _: False, "is not as it was downloaded")
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
        if _is_whole(path, offer):
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
        _remember(path, offer)
    how = "and has the SHA-256 that was announced" if offer.digest else "whole by its header and its length"
    logger.info("%s is here, %s (SHA-256 %s…).", arrival.named, how, digest[:12])


def is_outline(path: Path) -> bool:
    """Whether a file is only the outline of one that was never brought."""
    try:
        return OUTLINE in parse_header(path).metadata
    except (OSError, ValueError):
        return False


def _refuse(arrival: Arrival, response: httpx.Response) -> None:
    raise refusal(arrival.named, response, key=arrival.key)


def _part(path: Path) -> Path:
    return path.parent.parent / f"{path.parent.name}.part"


def _known(place: Path) -> tuple[Path | None, str | None]:
    """The file that is here as `bring` left it, and the version that the service gave it."""
    record = read_json(place / RECORD) or {}
    name, version = record.get("file"), record.get("version")
    if not isinstance(name, str) or not is_safe(name):
        return None, None
    path = place / name
    try:
        found = path.stat()
    except OSError:
        return None, None
    if record.get("stamp") != [found.st_size, found.st_mtime_ns]:
        return None, None
    return path, version


def _remember(path: Path, offer: Offer) -> None:
    """Write what `_known` reads. The caller holds the lock."""
    found = path.stat()
    record = {"file": f"{path.parent.name}/{path.name}", "stamp": [found.st_size, found.st_mtime_ns]}
    write_text(path.parent.parent / RECORD, json.dumps({**record, "version": offer.version}))


def _is_whole(path: Path, offer: Offer, begin: bytes = b"") -> bool:
    """Whether all of the offered file is at `path`: not an outline of it, and no other file. `begin`: its first bytes.

    It is read as a whole where the service states its SHA-256. The caller holds the lock.
    """
    try:
        header = parse_header(path)
        check_is_here(header)
        check_layout(header)
        with open_regular(path) as file:
            is_same = file.read(len(begin)) == begin
        if not is_same or path.stat().st_size != offer.size:
            return False
        return offer.digest is None or digests.sha256(path) == offer.digest
    except (OSError, ValueError):
        return False


def _file_name(offered: str) -> str:
    """A name with the suffix, and short enough for every volume."""
    stem = offered[: -len(SUFFIX)] if offered.lower().endswith(SUFFIX) else offered
    short = stem.encode()[:LONGEST_STEM].decode(errors="ignore")
    suffix = offered[len(stem) :] or SUFFIX
    return f"{short}{suffix}"


# ---- headers


def _beginning_of(named: str, offer: Offer, key: str, *, retries: RetryPolicy) -> tuple[bytes, bytes]:
    """The first bytes of a safetensors file: some of its tensors too, and its header alone.

    Raises SettingsError for another file.
    """
    begin = _first_bytes(named, offer, key, USUAL_HEADER, retries=retries)
    length = LENGTH_BYTES + int.from_bytes(begin[:LENGTH_BYTES], "little")
    is_one = begin[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and length <= MAX_HEADER_BYTES
    if is_one and length > len(begin):
        begin = _first_bytes(named, offer, key, length + USUAL_HEADER, retries=retries)
    if not is_one or len(begin) < length:
        raise SettingsError(f"{named} {_what_it_is(begin)}.")
    return begin, begin[:length]


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
        data = bytearray()  # bytes would be copied with each piece, of which a slow server sends thousands
        with client.stream("GET", offer.url, headers=headers, extensions={CONTENT: Content()}) as response:
            http.check_status(response, "the server")
            if response.status_code not in (200, 206):
                raise refusal(named, response, key=key)
            for block in response.iter_raw():
                data += block
                if len(data) >= count:
                    break
        return bytes(data[:count])

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
    tree["__metadata__"] = {**tree.get("__metadata__", {}), OUTLINE: "not downloaded yet"}
    text = json.dumps(tree).encode()
    try:
        with atomic.replacing(path, shared=True) as temporary:
            temporary.write_bytes(len(text).to_bytes(LENGTH_BYTES, "little") + text)
            os.truncate(temporary, LENGTH_BYTES + len(text) + size - len(raw))
    except OSError as problem:
        raise storage_error(problem, path) from problem
