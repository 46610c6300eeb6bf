"""A monitor page that a test asks: the real server on a real socket, in a thread."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrypoint.monitor.actions import Actions
from entrypoint.monitor.documents import Served
from entrypoint.monitor.live import Live
from entrypoint.monitor.server import listen, serve

TOKEN = "a-token-of-a-test-1"
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Event:
    name: str
    data: Any
    id: str = ""


@dataclass
class Page:
    """Where a server listens. `live`: None where it runs in a process of its own."""

    port: int
    live: Live | None = None
    headers: dict[str, str] = field(default_factory=lambda: dict(WITH_TOKEN))

    def ask(
        self, path: str, *, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """The whole answer. `path` goes out as it is: nothing is made nice."""
        sent = self.headers if headers is None else headers
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host="Host" in sent, skip_accept_encoding=True)
            for name, value in sent.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())
        finally:
            connection.close()

    def events(self, *, last: str = "", until: str | None = None, most: int = 50) -> list[Event]:
        """Events up to the first one called `until`; without it, those of the first batch."""
        return list(self.stream(last=last, until=until, most=most))

    def stream(self, *, last: str = "", until: str | None = None, most: int = 50) -> Iterator[Event]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {**self.headers, "Last-Event-ID": last} if last else self.headers
        connection.request("GET", "/events", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        fields: dict[str, str] = {}
        count = 0
        try:
            while count < most:
                line = answer.readline()
                if not line:
                    return
                text = line.decode().rstrip("\n")
                if text:
                    name, _, value = text.partition(": ")
                    fields[name] = value
                    continue
                if "event" in fields:
                    count += 1
                    yield Event(fields["event"], json.loads(fields["data"]), fields.get("id", ""))
                    if fields["event"] == until or (until is None and "id" in fields):
                        return
                elif until is None and "" in fields:  # a comment: nothing is new
                    return
                fields = {}
        finally:
            connection.close()


@contextmanager
def serving(out: Path, *, actions: Actions | None = None, **served: Any) -> Iterator[Page]:
    """The server for the folder `out`, until this process ends: a thread with nobody who asks does nothing."""
    listening = listen("127.0.0.1", 0)
    live = Live(Served(out, actions=actions.names if actions else (), **served))
    thread = threading.Thread(target=serve, args=(listening, live, TOKEN, actions), daemon=True)
    thread.start()
    yield Page(listening.getsockname()[1], live)
