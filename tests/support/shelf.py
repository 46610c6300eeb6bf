"""A server of files that people share by address: ranges, ETags, tokens, signatures, and what goes wrong with them.

`Civitai` is such a server with the two questions of Civitai's API. `shelf.asked` has the requests that came: method,
path with query, and the Authorization header.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, dict[str, str], bytes]
XML = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


class Shelf:
    """`with Shelf() as shelf: shelf.files["/a.safetensors"] = data`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tokens: dict[str, str] = {}  # path → the token that it asks for
        self.rules: dict[str, Callable[[Any], Answer | None]] = {}  # path → an answer in place of the file's; None: it
        self.disposition: dict[str, str] = {}
        self.cuts: dict[str, list[int]] = {}  # path → after so many bytes of a body the connection ends, once each
        self.asked: list[tuple[str, str, str]] = []

    def __enter__(self) -> Shelf:
        shelf = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                shelf.serve(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        token = request.headers.get("Authorization", "")
        length = int(request.headers.get("Content-Length") or 0)
        request.body = request.rfile.read(length)  # type: ignore[attr-defined]
        self.asked.append((request.command, request.path, token))
        answer = self.rules[path](request) if path in self.rules else None
        if answer is None:
            answer = self.answer(request, path, token)
        status, headers, body = answer
        cut = None
        if status in (200, 206) and len(body) > 1 and self.cuts.get(path):
            cut = self.cuts[path].pop(0)
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        try:
            request.wfile.write(body if cut is None else body[:cut])
            if cut is not None:
                request.wfile.flush()
                request.close_connection = True
                request.connection.shutdown(2)
        except OSError:  # the client has what it wanted
            request.close_connection = True

    def answer(self, request: BaseHTTPRequestHandler, path: str, token: str) -> Answer:
        if path not in self.files:
            return 404, {}, XML.format("NoSuchKey", "no such key").encode()
        if path in self.tokens and token != f"Bearer {self.tokens[path]}":
            return 401, {}, b'{"error":"Unauthorized"}'
        data = self.files[path]
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Content-Type": "application/octet-stream"}
        if path in self.disposition:
            headers["Content-Disposition"] = self.disposition[path]
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not found:
            return 200, headers, data
        first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, headers, data[first : last + 1]


class Civitai(Shelf):
    """The API of Civitai: `add` a version with its files."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: dict[int, dict[str, Any]] = {}

    def add(self, version: int, files: dict[int, tuple[str, bytes]], *, model: int = 77, **more: Any) -> None:
        listed = []
        for number, (name, data) in files.items():
            digest = hashlib.sha256(data).hexdigest().upper()
            listed.append({"id": number, "name": name, "type": "Model", "hashes": {"SHA256": digest}})
            self.files[f"/storage/{number}"] = data
        listed[0]["primary"] = True
        self.versions[version] = {"id": version, "modelId": model, "files": listed, **more}

    def answer(self, request: BaseHTTPRequestHandler, path: str, token: str) -> Answer:
        as_json = {"Content-Type": "application/json"}
        if found := re.fullmatch(r"/api/v1/model-versions/(\d+)", path):
            version = self.versions.get(int(found[1]))
            return (200, as_json, json.dumps(version).encode()) if version else (404, as_json, b"{}")
        if found := re.fullmatch(r"/api/v1/models/(\d+)", path):
            own = [v for v in self.versions.values() if v["modelId"] == int(found[1])]
            return 200, as_json, json.dumps({"modelVersions": sorted(own, key=lambda v: -v["id"])}).encode()
        if found := re.fullmatch(r"/api/download/models/(\d+)", path):
            if path in self.tokens and token != f"Bearer {self.tokens[path]}":
                return 401, as_json, b'{"error":"Unauthorized","message":"log in"}'
            number = parse_qs(urlsplit(request.path).query).get("fileId", [""])[0]
            # Another host, by its name: the storage that a signed address leads to.
            port = self.server.server_port
            place = f"http://localhost:{port}/storage/{number}?X-Amz-Signature=cAnarySigned1"
            return 307, {"Location": place}, b""
        return super().answer(request, path, token)
