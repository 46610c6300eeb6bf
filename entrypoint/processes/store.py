"""Where UPLOAD_TO leads: a folder of a bucket, or one signed address that a file may be put to.

Each file is sent with its MD5 sum, which the service compares before it keeps the file, and its length is asked for
afterwards. `manifest.json` beside the files has the size and the SHA-256 of each, and the ETag that the service gave
it: by these, a file that is there is not sent again, and whoever fetches the files can check them. Several jobs may
write to one folder, so the manifest is read again before each write, and says of each run whether it is complete.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from entrypoint.fetch import http
from entrypoint.fetch.doors import buckets
from entrypoint.fetch.doors.offer import refusal
from trainer.network import addresses
from trainer.network.errors import TransientError
from trainer.spec.errors import GatedError, SettingsError
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
CONFLICTS = 8  # times that other jobs may write the manifest between our reading and our writing
VARIABLES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}  # the beginning of a service's variables
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


def keys_for(address: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the service that `address` names; none for a signed address, which is its own key."""
    if not buckets.is_one(address):
        return {}
    own = VARIABLES[buckets.SCHEMES[address.partition("://")[0].lower()]]
    return {name: value for name, value in environ.items() if name.startswith(own)}


@dataclass
class Manifest:
    """`manifest.json` as it is there: rows by the name of a file, and what each run says of itself, by its name.

    `etag`: None where there is no such file; "" where the service gives none. `is_hidden`: whether there is one, the
    key may not know.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    etag: str | None = None
    is_hidden: bool = False

    def text(self) -> str:
        complete = all(run.get("complete") is True for run in self.runs.values())
        return json.dumps({"files": self.files, "runs": self.runs, "complete": complete}, indent=1)


class Store:
    """A place that takes files. Its methods raise TransientError, and KilnErrors for what a try does not mend."""

    def __init__(self, job: Job, client: httpx.Client) -> None:
        self.job, self.client = job, client
        self.is_one_address = not buckets.is_one(job.repo)
        self.place = None if self.is_one_address else buckets.parse(job.label, job.repo)
        self.key = buckets.KEY_OF[self.place.service] if self.place else SIGNED_KEY
        self.sent: dict[str, dict[str, Any]] = {}  # rows of what this process has put
        self.written: Manifest | None = None  # the last one that this process has put, or has tried to
        self.has_begun = False
        self.before: dict[str, Any] | None = None  # what the manifest said of a run of the job's name

    def check(self) -> None:
        """Read the manifest, and write into it that a run has begun: so the key may do both. A check only reads."""
        if self.place is None:
            return
        if not self.job.creates:
            self._manifest()
        elif not self.has_begun:
            self._update(self._begin)
            self.has_begun = True

    def send(self, title: str, files: Mapping[str, Path], texts: Mapping[str, str], *, run: str, final: bool) -> str:
        """Put files and texts by their names; returns the SHA-256 of the main file, the last one.

        To a single address goes the main file alone, once it is final.
        """
        if self.place is None:
            name, path = list(files.items())[-1]
            if not final:
                return ""
            digest = self._put_file(name, path, None)["sha256"]
            log.info("%s: %s is there; an address takes no other files.", self.job.label, name)
            return str(digest)
        there = self._manifest().files
        rows = {name: self._put_file(name, path, there.get(name)) for name, path in files.items()}
        for name, text in texts.items():
            self._put(name, text.encode())

        def add(manifest: Manifest) -> None:
            manifest.files |= rows
            if run != self.job.name:
                self._take_back(manifest)
            manifest.runs[run] = {"complete": final, "newest": title}

        self._update(add)
        return str(rows[list(files)[-1]]["sha256"])

    # ---- the manifest, which other jobs may write too

    def _begin(self, manifest: Manifest) -> None:
        """The job's name is that of its run, unless the trainer finds that another one has it."""
        self.before = manifest.runs.get(self.job.name)
        manifest.runs[self.job.name] = {**(self.before or {}), "complete": False}

    def _take_back(self, manifest: Manifest) -> None:
        if self.has_begun:
            manifest.runs.pop(self.job.name, None)
            if self.before is not None:
                manifest.runs[self.job.name] = self.before
            self.has_begun = False

    def _update(self, change: Callable[[Manifest], None]) -> None:
        """Read the manifest, change it and write it, unless another job has written it meanwhile: then once more."""
        for _ in range(CONFLICTS):
            found = self._manifest()
            change(found)
            condition: dict[str, str] = {}
            if self._takes_conditions():
                if found.etag is None:
                    condition["If-None-Match"] = "*"
                elif found.etag:
                    condition["If-Match"] = found.etag
            self.written = found
            if self._put(MANIFEST, found.text().encode(), condition=condition) is not None:
                return
            if found.is_hidden:
                raise GatedError(
                    f"{self.job.label}: the key may write, and may not read the {MANIFEST} that is there. Give it the "
                    f"right to read (s3:GetObject), or set {self.key}."
                )
        raise TransientError(f"other jobs write {MANIFEST} all the time")

    def _takes_conditions(self) -> bool:
        """At Google such a header would have to be a part of the signature."""
        return self.place is not None and self.place.service in ("s3", "az")

    def _manifest(self) -> Manifest:
        assert self.place is not None
        address = buckets.signed(self.job.label, self.place.below(MANIFEST), "GET", self.job.clouds)
        answer = self.client.get(address, headers={"Accept-Encoding": "identity"})
        http.check_status(answer, "the service")
        if answer.status_code == 404 and b"NoSuchBucket" not in answer.content:
            return Manifest()
        if _is_hidden(answer):  # whether it may be written, the service says when it is
            return Manifest(is_hidden=True)
        if answer.status_code != 200:
            raise refusal(self.job.label, answer, key=self.key)
        try:
            found = json.loads(answer.content[:MOST_MANIFEST])
            files, runs = found.get("files"), found.get("runs")
        except (ValueError, RecursionError, AttributeError):
            if self.written is not None:  # the service has kept other bytes than ours
                return Manifest(self.written.files, self.written.runs, answer.headers.get("etag", ""))
            raise SettingsError(
                f"{self.job.label}: there is a {MANIFEST} that is none of Kiln's. Name another folder of the bucket."
            ) from None
        return Manifest(_objects(files), _objects(runs), answer.headers.get("etag", ""))

    # ---- files

    def _put_file(self, name: str, path: Path, there: Mapping[str, Any] | None) -> dict[str, Any]:
        """Send a file unless it is there; returns its row of the manifest. Raises OSError where it cannot be read.

        `there`: its row in the manifest that is there. The row alone is no proof, and neither is the size: another
        job may have put a file of the same name since. The service gives each version of a file an ETag of its own.
        """
        size, sha256, md5 = _sums(path)
        row: dict[str, Any] = {"bytes": size, "sha256": sha256}
        if self.place is not None:
            for known in (self.sent.get(name), there):
                etag = known.get("etag") if known else None
                if known and etag and known == {**row, "etag": etag} and self._there(name) == (size, etag):
                    return dict(known)
        if size > LARGEST_BYTES:
            raise SettingsError(f"{self.job.label}: {name} has more than 5 GiB, the most that is sent.")
        kept_as = self._request(name, partial(_pieces, path), size, md5)
        if self.place is not None:
            found = self._there(name)
            if found is None or found[0] != size:
                raise TransientError(f"{name} has {size} bytes, and {found[0] if found else None} of them are there")
        if kept_as:
            row["etag"] = kept_as
        self.sent[name] = row
        return row

    def _put(self, name: str, data: bytes, *, condition: Mapping[str, str] | None = None) -> str | None:
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        return self._request(name, lambda: iter([data]), len(data), md5, condition=condition)

    def _request(
        self, name: str, content: Any, size: int, md5: bytes, *, condition: Mapping[str, str] | None = None
    ) -> str | None:
        """Put bytes; returns their ETag, "" where the service gives none, and None where `condition` does not hold.

        A service that knows no conditions is asked without.
        """
        address = self.job.repo
        if self.place is not None:
            address = buckets.signed(self.job.label, self.place.below(name), "PUT", self.job.clouds)
        headers = {"Content-Length": str(size), "Content-MD5": base64.b64encode(md5).decode(), **(condition or {})}
        is_azure = self.place is not None and self.place.service == "az"
        if is_azure or urlsplit(address).netloc.endswith(".blob.core.windows.net"):
            headers["x-ms-blob-type"] = "BlockBlob"
        answer = self.client.put(address, content=content(), headers=headers, follow_redirects=False)
        if b"BadDigest" in answer.content or answer.headers.get("x-ms-error-code") == "Md5Mismatch":
            raise TransientError(f"other bytes have arrived than those of {name}")
        if condition and answer.status_code in (409, 412):
            return None
        if condition and answer.status_code == 501:
            return self._request(name, content, size, md5)
        if answer.status_code != 507:  # its storage is full, which no other try changes
            http.check_status(answer, "the service")
        if answer.status_code not in (200, 201, 204):
            raise refusal(self.job.label, answer, key=self.key, writes=True)
        etag = str(answer.headers.get("etag", ""))
        kept = etag.strip('"')
        if len(kept) == 32 and _is_hex(kept) and kept != md5.hex() and not _is_encrypted(answer):
            raise TransientError(f"the service has kept other bytes than those of {name}")
        return etag

    def _there(self, name: str) -> tuple[int | None, str] | None:
        """How many bytes of a file are there, and its ETag; None where there is no such file."""
        assert self.place is not None
        address = buckets.signed(self.job.label, self.place.below(name), "GET", self.job.clouds)
        headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        with self.client.stream("GET", address, headers=headers) as answer:
            http.check_status(answer, "the service")
            if answer.status_code == 404:
                return None
            if answer.status_code == 416:
                return 0, ""
            if answer.status_code not in (200, 206):
                answer.read()
                if _is_hidden(answer):
                    return None
                raise refusal(self.job.label, answer, key=self.key)
            length = answer.headers.get("content-length" if answer.status_code == 200 else "content-range", "")
            return as_integer(length.rpartition("/")[2]), str(answer.headers.get("etag", ""))


def _is_hidden(answer: httpx.Response) -> bool:
    """Whether a service may hide that there is no such file: S3 answers so to a key without s3:ListBucket."""
    said = answer.content
    return answer.status_code == 403 and b"<Code>AccessDenied<" in said and b"expired" not in said.lower()


def _objects(found: Any) -> dict[str, dict[str, Any]]:
    """Those values of a JSON object that are objects."""
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


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
