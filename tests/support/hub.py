"""A local HTTP server that stands in for the Hub, with faults to order and a log of what was asked.

It answers as the Hub does: models and datasets by revision, files by `resolve`, large ones through a redirect to
another host that must not see the token, and refusals with the Hub's own headers.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

from tests.support import hub_uploads as uploads

BLOCK = 2**14
LARGE = (".safetensors", ".parquet", ".zip", ".tar", ".png", ".jpg")  # kept in large file storage


@dataclass
class Fault:
    """What goes wrong with the next `times` answers whose path matches `path`."""

    path: str  # a glob
    times: int = 1
    status: int | None = None  # answer with this status
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""  # of the answer with this status
    cut_at: int | None = None  # close the connection after this byte of the file
    stall_at: int | None = None  # send nothing more after this byte of the file
    flip_at: int | None = None  # change this byte of the file
    method: str = "GET"
    fired: int = 0
    reached: threading.Event = field(default_factory=threading.Event)  # its place in the file was come to
    released: threading.Event = field(default_factory=threading.Event)  # ends a stall


@dataclass
class Asked:
    """One request, and how many bytes of its body were sent."""

    method: str
    path: str
    status: int = 0
    range: str | None = None
    authorized: bool = False
    sent: int = 0


@dataclass
class Repo:
    """A repository: files by commit, and names of commits."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False
    log: list[str] = field(default_factory=list)  # titles of the commits that were uploaded


class Hub:
    """The server. `with Hub() as hub:`; `hub.endpoint` is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.cards: dict[tuple[str, str], dict[str, str]] = {}  # what a repository's page says of it, by kind and name
        self.plain: dict[str, bytes] = {}  # path → content, for what is no repository
        self.faults: list[Fault] = []
        self.log: list[Asked] = []
        self.granted: set[str] = set()  # tokens that may read gated and private repositories
        self.writers: set[str] = set()  # tokens that may write and create repositories
        self.large: dict[str, bytes] = {}  # uploaded, by SHA-256
        self.known_tokens: set[str] = set()
        self.down = False  # every answer is 503
        self.lock = threading.Lock()

    def reset(self) -> None:
        """Forget everything, for the next test."""
        for fault in self.faults:
            fault.released.set()
        with self.lock:
            self.repos, self.plain, self.faults, self.log = {}, {}, [], []
            self.cards = {}
            self.granted, self.known_tokens, self.down = set(), set(), False
            self.writers, self.large = set(), {}

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reset()
        self.server.shutdown()
        self.server.server_close()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(
        self,
        kind: str,
        name: str,
        files: dict[str, bytes],
        *,
        ref: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """A commit of a repository with these files, named `ref`; returns its hash."""
        commit = hashlib.sha1(repr((name, ref, sorted(files.items()))).encode()).hexdigest()
        repo = self.repos.setdefault((kind, name), Repo({}, {}, gated, private))
        repo.commits[commit] = files
        repo.refs[ref] = commit
        return commit

    def fault(self, path: str, **what: object) -> Fault:
        """Order a fault; the test asserts on its `fired`."""
        fault = Fault(path, **what)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def asked(self, path: str = "*", method: str = "GET") -> list[Asked]:
        with self.lock:
            return [a for a in self.log if a.method == method and fnmatch.fnmatch(a.path, path)]

    def sent(self, path: str = "*") -> int:
        """Bytes of bodies sent for paths that match."""
        return sum(a.sent for a in self.asked(path))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.fired < fault.times and fnmatch.fnmatch(path, fault.path):
                    fault.fired += 1
                    return fault
        return None


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name, as `Hub.add` takes them."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.ordered: Fault | None = None
        self.asked = Asked(self.command, path)
        body = self._body() if self.command in ("POST", "PUT") else b""
        if path == "/api/agent-harnesses":  # the client's own statistics, once a process
            self._send(200, b'{"standardEnvVars": [], "harnesses": {}}', {})
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.asked = Asked(self.command, path, range=self.headers.get("Range"), authorized=bool(token))
        with self.hub.lock:
            self.hub.log.append(self.asked)
        self.ordered = self.hub.take_fault(self.command, path)
        if self.hub.down or (self.ordered and self.ordered.status):
            ordered = self.ordered or Fault("*", status=503)
            self._send(ordered.status or 503, ordered.body, ordered.headers)
        elif self.command in ("POST", "PUT") or "/auth-check/" in path:
            uploads.answer(self, path, token, body)
        elif path.startswith("/cdn/"):
            self._send_file(self._blobs()[path.removeprefix("/cdn/")], {})
        elif path in self.hub.plain:
            self._send_file(self.hub.plain[path], {"ETag": f'"{git_hash(self.hub.plain[path])}"'})
        elif path.startswith("/api/"):
            self._api(path, token)
        elif "/resolve/" in path:
            self._resolve(path, token)
        else:
            self._send(404, b"not found", {})

    def _blobs(self) -> dict[str, bytes]:
        files = (f for r in self.hub.repos.values() for c in r.commits.values() for f in c.values())
        return {hashlib.sha256(f).hexdigest(): f for f in files}

    def _find(self, kind: str, name: str, revision: str, token: str) -> tuple[Repo, str] | None:
        """The repository and its commit; otherwise answers with the Hub's refusal and gives None."""
        if token and token not in self.hub.known_tokens | self.hub.granted | self.hub.writers:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and token not in self.hub.granted | self.hub.writers):
            if token:
                return self._refuse(404, "RepoNotFound", "Repository not found")
            return self._refuse(401, None, "Invalid username or password.")  # as the Hub says to strangers
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        self._send(status, b"", {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})})

    def _api(self, path: str, token: str) -> None:
        kind, rest = path.removeprefix("/api/").split("/", 1)
        name, _, revision = rest.partition("/revision/")
        found = self._find(kind[:-1], name, revision or "main", token)
        if found is None:
            return
        repo, commit = found
        siblings = []
        for file, data in repo.commits[commit].items():
            entry: dict[str, object] = {"rfilename": file, "size": len(data), "blobId": git_hash(data)}
            if file.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        gated = "manual" if repo.gated else False
        body = {"id": name, "sha": commit, "private": repo.private, "gated": gated, "siblings": siblings, "tags": []}
        body["cardData"] = self.hub.cards.get((kind[:-1], name), {})
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, path: str, token: str) -> None:
        place, _, rest = path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        kind = "dataset" if place.startswith("datasets/") else "model"
        found = self._find(kind, place.removeprefix("datasets/"), revision, token)
        if found is None:
            return
        repo, commit = found
        if repo.gated and token not in self.hub.granted:
            status, say = (403, "You are not in the authorized list") if token else (401, "You must be authenticated")
            self._refuse(status, "GatedRepo", f"Access to {place} is restricted. {say}.")
        elif file not in repo.commits[commit]:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif file.endswith(LARGE):
            data = repo.commits[commit][file]
            digest = hashlib.sha256(data).hexdigest()
            headers = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'}
            # Another host by name: the client must not send the token along.
            self._send(
                302, b"", {**headers, "Location": f"http://localhost:{self.hub.port}/cdn/{digest}?signature=s3cret"}
            )
        else:
            data = repo.commits[commit][file]
            self._send_file(data, {"X-Repo-Commit": commit, "ETag": f'"{git_hash(data)}"'})

    def _send_file(self, data: bytes, headers: dict[str, str]) -> None:
        """Content with ranges, and with the fault that was ordered, whose places count from the file's first byte."""
        start = 0
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
            if start >= len(data):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        else:
            stop = len(data)
        self._send(206 if wanted else 200, data[start:stop], {**headers, "Accept-Ranges": "bytes"}, start=start)
        return None

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, start: int = 0) -> None:
        self.asked.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.ordered
        if fault and fault.flip_at is not None and fault.flip_at >= start:
            at = fault.flip_at - start
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        end = next((at for at in (fault.cut_at, fault.stall_at) if at is not None), None) if fault else None
        stop = len(body) if end is None else max(0, end - start)
        try:
            for place in range(0, stop, BLOCK):
                block = body[place : min(place + BLOCK, stop)]
                self.wfile.write(block)
                with self.hub.lock:
                    self.asked.sent += len(block)
        except OSError:  # the client is gone: what it got was counted
            self.close_connection = True
            return
        if fault:
            fault.reached.set()
            if fault.stall_at is not None:
                fault.released.wait()
            if end is not None:
                self.close_connection = True
