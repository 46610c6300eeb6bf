"""The addresses of the page, and what each may do. All of them are below one folder, whatever a proxy calls it.

| address | what |
| --- | --- |
| `.` | the page; the door where nobody has shown a token yet |
| `page/NAME` | its style and scripts, which are public: they hold nothing of a job |
| `action/NAME` | POST: save, sample or stop now (`actions`); 409 with the reason where the job cannot |
| `enter` | POST {"token"}: a cookie for the token |
| `events` | live events (`stream`) |
| `sample/NAME`, `small/NAME` | a sample as it is, or as a small JPEG |
| `images?first=N`, `picture/N` | images of the dataset as they are trained, from number N on; one of them, small |
| `file/NAME` | a LoRA file, the log, the report: what `documents.downloads` lists |
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from entrypoint.monitor.access import Access, is_from_another_site
from entrypoint.monitor.actions import Actions
from entrypoint.monitor.dataset import find_image, picture
from entrypoint.monitor.documents import downloads, why_not
from entrypoint.monitor.files import file_response
from entrypoint.monitor.live import Live
from entrypoint.monitor.sample_list import SmallImages
from entrypoint.monitor.stream import Streams
from trainer.process.vitals import BETWEEN_SAVES_S
from trainer.spec.values import as_integer
from trainer.storage import own_files
from trainer.storage.read import has_link, read_regular

PAGE = Path(__file__).parent / "page"
LARGEST_PAGE_FILE = 1 << 20
OWN_HEADER = "x-kiln-page"  # which no form can send, and no other site's script without being allowed to
LARGEST_BODY = 4096  # bytes of a request
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing runs, loads or connects but what this server sends; no other page can hold this one in a frame.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "private, no-store",
    "x-accel-buffering": "no",  # proxies that would collect events until there are many
}


class Door:
    """In front of everything: refuses whoever has no token, and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                new = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] += [pair for pair in new if pair[0] not in there]
            await send(message)

        refusal = self._refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _refusal(self, method: str, path: str, headers: Headers) -> Response | None:
        if method not in ("GET", "HEAD") and is_from_another_site(headers):
            return Response("This request comes from another site.\n", 403)
        if path == "/enter" or path.startswith("/page/"):
            return None
        allowed = self._access.allows(headers)
        if allowed:
            return None
        # Before anything is taken: an old cookie must not cost its owner the door while others try tokens.
        if path == "/" and "authorization" not in headers:
            return page_file("enter.html", status=401)
        if allowed is not None and not self._access.bucket.take():
            return too_many()
        if path == "/":  # a cookie of an earlier job
            return page_file("enter.html", status=401)
        return Response("Open the address that the job's log shows: it has the token.\n", 401)


def too_many() -> Response:
    return Response("Too many wrong tokens.\n", 429, {"Retry-After": "1"})


def page_file(name: str, *, status: int = 200) -> Response:
    path = PAGE / name
    content = read_regular(path, limit=LARGEST_PAGE_FILE)
    return Response(content, status, media_type=TYPES[path.suffix])


class Site:
    """What each address answers. Whoever comes here has passed the door."""

    def __init__(self, live: Live, access: Access, actions: Actions | None) -> None:
        self._live = live
        self._actions = actions
        self._access = access
        self._streams = Streams(live)
        self._small = SmallImages()
        # One picture is made at a time: they must not take the cores, nor the threads by which everything else is read.
        self._pictures = CapacityLimiter(1)
        self._page_names = {path.name for path in PAGE.iterdir() if path.suffix in TYPES}

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/page/{name}", self.asset),
            Route("/enter", self.enter, methods=["POST"]),
            Route("/events", self.events),
            Route("/sample/{name}", self.sample),
            Route("/small/{name}", self.small_sample),
            Route("/file/{name}", self.file),
            Route("/images", self.images),
            Route("/picture/{number:int}", self.picture),
            Route("/health", self.health),
            Route("/action/{name}", self.action, methods=["POST"]),
        ]

    async def page(self, _request: Request) -> Response:
        return page_file("index.html")

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        return page_file(name) if name in self._page_names else nothing()

    async def enter(self, request: Request) -> Response:
        body = await json_body(request)
        token = body.get("token") if isinstance(body, dict) else None
        if not isinstance(token, str) or not self._access.is_token(token.strip()):
            return Response("This is not the token.\n", 401) if self._access.bucket.take() else too_many()
        response = Response(status_code=204)
        is_secure = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto", ""))
        secure = "; Secure" if is_secure else ""
        # Without a path: the browser takes the folder that it has asked in, whatever a proxy calls it.
        own = f"{self._access.cookie_name}={self._access.cookie}"
        response.headers["set-cookie"] = f"{own}; HttpOnly; SameSite=Strict{secure}"
        return response

    async def events(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if self._streams.is_full:
            return Response("Too many viewers.\n", 503, {"Retry-After": "10"})
        last = request.headers.get("last-event-id", "")
        return StreamingResponse(self._streams.events(last), media_type="text/event-stream")

    async def sample(self, request: Request) -> Response:
        path = await self._sample_path(request)
        if path is None:
            return nothing()
        return await file_response(path, request.headers, media_type="image/png", method=request.method)

    async def small_sample(self, request: Request) -> Response:
        path = await self._sample_path(request)
        made = b""
        if path is not None and not has_link(path):
            made = await to_thread.run_sync(self._small.sample, path, limiter=self._pictures)
        if not made:
            return nothing()
        return Response(made, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    async def _sample_path(self, request: Request) -> Path | None:
        name = request.path_params["name"]
        if not own_files.is_in_samples(name):
            return None
        await self._streams.look()
        return self._live.shown.home / "sample" / str(name)

    async def images(self, request: Request) -> Response:
        await self._streams.look()
        first = as_integer(request.query_params.get("first", "0"))
        live, begin = self._live, max(0, first or 0)
        page = partial(live.dataset.page, begin, live.plan, inside=live.pictures_inside)
        return JSONResponse(await to_thread.run_sync(page))

    async def picture(self, request: Request) -> Response:
        await self._streams.look()
        made = await to_thread.run_sync(self._picture, request.path_params["number"], limiter=self._pictures)
        if not made:
            return nothing()
        return Response(made, media_type="image/jpeg")

    def _picture(self, number: int) -> bytes:
        images = self._live.dataset.images
        if number >= len(images):
            return b""
        path = find_image(images[number], self._live.plan, inside=self._live.pictures_inside)
        if path is None:
            return b""
        return self._small.get(path, lambda: picture(path, images[number]), kind=f"{number} ")

    async def file(self, request: Request) -> Response:
        await self._streams.look()
        found = await to_thread.run_sync(downloads, self._live.served.out, self._live.shown)
        path = found.get(request.path_params["name"])
        if path is None:
            return nothing()
        kind = "application/octet-stream"
        return await file_response(path, request.headers, media_type=kind, method=request.method)

    async def action(self, request: Request) -> Response:
        """Nothing that a form of another site could send: a token or a strict cookie, and this page's own header."""
        if request.headers.get(OWN_HEADER) is None:
            return Response(f"A request needs the header {OWN_HEADER}.\n", 403)
        name = request.path_params["name"]
        if self._actions is None or name not in self._actions.names:
            return nothing()
        await self._streams.look()
        reason = why_not(name, self._live.shown.phase, self._live.plan)
        if not reason and self._actions.is_too_soon(name):
            reason = f"A save was asked for less than {BETWEEN_SAVES_S:.0f} s ago."
        if reason:
            return Response(f"{reason}\n", 409)
        self._actions.ask(name)
        return Response(status_code=202)

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"ok": True})


def make_app(live: Live, access: Access, actions: Actions | None = None) -> ASGIApp:
    """The whole application."""
    return Door(Starlette(routes=Site(live, access, actions).routes()), access)


def nothing() -> Response:
    return Response("There is nothing by this name.\n", 404)


async def json_body(request: Request) -> object:
    """The JSON of a small request; None for anything else."""
    data = b""
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > LARGEST_BODY:
                return None
        return json.loads(data)
    except (ValueError, RecursionError, ClientDisconnect):
        return None
