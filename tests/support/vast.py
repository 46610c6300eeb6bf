"""A local server that stands in for the part of Vast.ai's API by which a container ends its own instance.

Written after https://docs.vast.ai/api-reference/instances (manage and destroy instance).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "vast-canary-0123456789abcdef"
NUMBER = "4242"


@dataclass
class Vast:
    """`failing`: what the next answers are instead, as (status, body)."""

    url: str = ""
    state: str = "running"  # of the one instance; gone: destroyed
    failing: list[tuple[int, bytes]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    on_end: Callable[[], object] = lambda: None  # the instance's end sends a signal to its container

    @property
    def environment(self) -> dict[str, str]:
        """What Vast.ai sets in each container, and where this server is."""
        own = {"CONTAINER_API_KEY": KEY, "CONTAINER_ID": NUMBER, "VAST_CONTAINERLABEL": f"C.{NUMBER}"}
        return {**own, "VAST_URL": self.url}


@contextmanager
def vast_server() -> Iterator[Vast]:
    vast = Vast()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def refuse(self, status: int, error: str) -> None:
            self.answer(status, json.dumps({"success": False, "error": error, "msg": error}).encode())

        def ask(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            vast.asked.append(f"{self.command} {self.path} {body.decode()}")
            if vast.failing:
                self.answer(*vast.failing.pop(0))
            elif self.headers["Authorization"] != f"Bearer {KEY}":
                self.refuse(401, f"invalid key {self.headers['Authorization']}")  # as careless servers do
            elif self.path != f"/api/v0/instances/{NUMBER}/" or vast.state == "gone":
                self.refuse(404, "no such instance")
            elif self.command == "PUT" and json.loads(body) != {"state": "stopped"}:
                self.refuse(400, "invalid args")
            else:
                vast.state = "gone" if self.command == "DELETE" else "stopped"
                self.answer(200, b'{"success": true}')
                vast.on_end()

        do_PUT = do_DELETE = ask

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    vast.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield vast
    finally:
        server.shutdown()
        server.server_close()
