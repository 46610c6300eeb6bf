"""Where UPLOAD_TO leads: a folder of a bucket, or one signed address that a file may be put to.

Each file is sent with its MD5 sum, which the service compares before it keeps the file, and its length is asked for
afterwards. `manifest.json` beside the files has the size and the SHA-256 of each: by it, a file that is there is not
sent again, and whoever fetches the files can check them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from entrypoint.fetch import http
from entrypoint.fetch.doors import buckets
from entrypoint.fetch.doors.offer import refusal
from trainer.network import addresses
from trainer.network.errors import TransientError
from trainer.spec.errors import SettingsError
from trainer.spec.values import as_integer
from trainer.storage.read import open_regular

if TYPE_CHECKING:
    import httpx

    from entrypoint.processes.upload import Job

log = logging.getLogger("entrypoint.processes.upload")
MANIFEST = "manifest.json"
MOST_MANIFEST = 2**22  # bytes
LARGEST_BYTES = 5 * 2**30  # that these services take in one request
PIECE_BYTES = 2**20
SIGNED_KEY = "UPLOAD_TO to a new signed address, made for PUT"


def problem_of(address: str) -> str | None:
    """Why files cannot be put to `address`, as the rest of a sentence; None if they may be."""
    if buckets.is_one(address):
        return None
    if not address.lower().startswith(("http://", "https://")):
        return "is neither a folder of a bucket (s3://BUCKET/PATH, gs://, az://) nor a signed https address"
    if problem := addresses.problem_of(address):
        return f"cannot be asked: {problem}. Fix: copy the signed address again"
    if "?" not in address:
        return "has no signature, so that nobody may write there. Fix: make an address that is signed for PUT"
    return None


class Store:
    """A place that takes files. Its methods raise TransientError, and KilnErrors for what a try does not mend."""

    def __init__(self, job: Job, client: httpx.Client) -> None:
        self.job, self.client = job, client
        self.is_one_address = not buckets.is_one(job.repo)
        self.place = None if self.is_one_address else buckets.parse(job.label, job.repo)
        self.key = buckets.KEY_OF[self.place.service] if self.place else SIGNED_KEY
        self.known: dict[str, Any] = {}
        self.has_read = False

    def check(self) -> None:
        """Read the manifest of an earlier job, and write it back: so the key may do both. A check only reads."""
        if self.place is None:
            return
        if not self.has_read:
            self.known = self._manifest()
            self.has_read = True
        if not self.job.creates:
            return
        text = json.dumps({"files": self.known, "complete": False}, indent=1)
        self._put(MANIFEST, text.encode())

    def send(self, title: str, files: Mapping[str, Path], texts: Mapping[str, str], *, final: bool) -> str:
        """Put files and texts by their names; returns the SHA-256 of the main file, the last one.

        To a single address goes the main file alone, once it is final.
        """
        if self.place is None:
            name, path = list(files.items())[-1]
            if not final:
                return ""
            digest = self._put_file(name, path)["sha256"]
            log.info("%s: %s is there; an address takes no other files.", self.job.label, name)
            return str(digest)
        row: dict[str, Any] = {}
        for name, path in files.items():
            row = self._put_file(name, path)
        main = row["sha256"]
        for name, text in texts.items():
            self._put(name, text.encode())
        text = json.dumps({"files": self.known, "complete": final, "newest": title}, indent=1)
        self._put(MANIFEST, text.encode())
        return str(main)

    def _put_file(self, name: str, path: Path) -> dict[str, Any]:
        """Send a file unless it is there; returns its row of the manifest. Raises OSError where it cannot be read."""
        size, sha256, md5 = _sums(path)
        row = {"bytes": size, "sha256": sha256}
        if self.place is not None and self.known.get(name) == row and self._size(name) == size:
            return row
        if size > LARGEST_BYTES:
            raise SettingsError(f"{self.job.label}: {name} has more than 5 GiB, the most that is sent.")
        self._request(name, partial(_pieces, path), size, md5)
        if self.place is not None and (there := self._size(name)) != size:
            raise TransientError(f"{name} has {size} bytes, and {there} of them are there")
        self.known[name] = row
        return row

    def _put(self, name: str, data: bytes) -> None:
        self._request(name, lambda: iter([data]), len(data), hashlib.md5(data, usedforsecurity=False).digest())

    def _request(self, name: str, content: Any, size: int, md5: bytes) -> None:
        address = self.job.repo
        if self.place is not None:
            address = buckets.signed(self.job.label, self.place.below(name), "PUT", self.job.clouds)
        headers = {"Content-Length": str(size), "Content-MD5": base64.b64encode(md5).decode()}
        is_azure = self.place is not None and self.place.service == "az"
        if is_azure or urlsplit(address).netloc.endswith(".blob.core.windows.net"):
            headers["x-ms-blob-type"] = "BlockBlob"
        answer = self.client.put(address, content=content(), headers=headers, follow_redirects=False)
        if b"BadDigest" in answer.content or answer.headers.get("x-ms-error-code") == "Md5Mismatch":
            raise TransientError(f"other bytes have arrived than those of {name}")
        if answer.status_code != 507:  # its storage is full, which no other try changes
            http.check_status(answer, "the service")
        if answer.status_code not in (200, 201, 204):
            raise refusal(self.job.label, answer, key=self.key, writes=True)
        kept = answer.headers.get("etag", "").strip('"')
        if len(kept) == 32 and _is_hex(kept) and kept != md5.hex() and not _is_encrypted(answer):
            raise TransientError(f"the service has kept other bytes than those of {name}")

    def _size(self, name: str) -> int | None:
        """How many bytes of a file are there; None where there is no such file."""
        assert self.place is not None
        address = buckets.signed(self.job.label, self.place.below(name), "GET", self.job.clouds)
        headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        with self.client.stream("GET", address, headers=headers) as answer:
            http.check_status(answer, "the service")
            if answer.status_code == 404:
                return None
            if answer.status_code == 416:
                return 0
            if answer.status_code not in (200, 206):
                raise refusal(self.job.label, answer, key=self.key)
            length = answer.headers.get("content-length" if answer.status_code == 200 else "content-range", "")
            return as_integer(length.rpartition("/")[2])

    def _manifest(self) -> dict[str, Any]:
        """The rows of the manifest that is there."""
        assert self.place is not None
        address = buckets.signed(self.job.label, self.place.below(MANIFEST), "GET", self.job.clouds)
        answer = self.client.get(address)
        http.check_status(answer, "the service")
        if answer.status_code == 404 and b"NoSuchBucket" not in answer.content:
            return {}
        if answer.status_code != 200:
            raise refusal(self.job.label, answer, key=self.key)
        try:
            files = json.loads(answer.content[:MOST_MANIFEST]).get("files")
        except (ValueError, RecursionError, AttributeError):
            raise SettingsError(
                f"{self.job.label}: there is a {MANIFEST} that is none of Kiln's. Name another folder of the bucket."
            ) from None
        return files if isinstance(files, dict) else {}


def _is_hex(text: str) -> bool:
    return all(letter in "0123456789abcdef" for letter in text)


def _is_encrypted(answer: httpx.Response) -> bool:
    """Whether the service encrypts with a key of its customer: then the ETag is no MD5 sum."""
    return any(name.startswith("x-amz-server-side-encryption") for name in answer.headers)


def _sums(path: Path) -> tuple[int, str, bytes]:
    size, sha256, md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    for piece in _pieces(path):
        size += len(piece)
        sha256.update(piece)
        md5.update(piece)
    return size, sha256.hexdigest(), md5.digest()


def _pieces(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
