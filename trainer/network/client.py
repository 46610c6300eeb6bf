"""Open the one HTTP client, and turn its errors into ours.

`open_client` gives an httpx client whose transport bounds every answer (`bounds`), follows few redirects and none to a
weaker scheme, and reads the proxies of the environment without falling over them. huggingface_hub is given the same
client (`huggingface_hub.set_client_factory`).
"""

from __future__ import annotations

import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from trainer.network import addresses, bounds
from trainer.network.errors import HopelessError, TransientError
from trainer.spec.errors import UnreachableError
from trainer.spec.values import printable

MOST_REDIRECTS = 10
TIMEOUT_S = 10.0
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
CONTENT = "kiln_content"  # the extension of a request that asks for a file: see `Content`


@dataclass(frozen=True)
class Content:
    """What a request that asks for a file, and not for an answer, accepts: `most` bytes, as they are sent."""

    most: int | None = None


class RefusedRedirectError(httpx.RequestError):
    """The server leads to where nobody should follow."""


class Client(httpx.Client):
    """httpx's client; `send` raises TransientError and HopelessError in the place of httpx's errors."""

    def send(
        self,
        request: httpx.Request,
        *,
        stream: bool = False,
        auth: Any = httpx.USE_CLIENT_DEFAULT,
        follow_redirects: Any = httpx.USE_CLIENT_DEFAULT,
    ) -> httpx.Response:
        with errors_as_ours():
            return super().send(request, stream=stream, auth=auth, follow_redirects=follow_redirects)


def open_client(
    *,
    timeout: float = TIMEOUT_S,
    slowest: int = bounds.SLOWEST,
    on_answer: Callable[[httpx.Response], None] | None = None,
) -> Client:
    """A client that reads the proxies and certificates of the environment. All of its answers are bounded.

    `slowest`: bytes/s below which a body is given up; 0 for streams that are silent for long. `on_answer` sees each
    answer, redirects too, and may raise.
    """
    hooks: list[Callable[[httpx.Response], None]] = [_check_redirect]
    if on_answer is not None:
        hooks.append(on_answer)
    return Client(
        transport=_Transport(slowest),
        timeout=timeout,
        follow_redirects=True,
        max_redirects=MOST_REDIRECTS,
        headers={"Accept-Encoding": "identity", "User-Agent": "kiln"},
        event_hooks={"response": hooks},
    )


def open_library_client() -> httpx.Client:
    """A client for huggingface_hub's own downloads, which rely on httpx's own errors: with the same bounds.

    What is no JSON may be of any size: it is a file.
    """
    return httpx.Client(
        transport=_Transport(bounds.SLOWEST, has_files=True),
        timeout=TIMEOUT_S,
        follow_redirects=True,
        max_redirects=MOST_REDIRECTS,
        event_hooks={"response": [_check_redirect]},
    )


def _check_redirect(answer: httpx.Response) -> None:
    """Raises RefusedRedirectError for one to another scheme, to https from http excepted."""
    if not answer.has_redirect_location:
        return
    place = answer.headers["location"]
    try:
        target = answer.request.url.join(place)
        problem = addresses.problem_of(str(target))
    except (httpx.InvalidURL, ValueError):
        raise RefusedRedirectError("it redirects to what is no address") from None
    if problem is not None:
        raise RefusedRedirectError(f"it redirects to {addresses.shown(str(target))}: {problem}")
    if answer.request.url.scheme == "https" and target.scheme != "https":
        raise RefusedRedirectError(f"it redirects from https to {addresses.shown(str(target))}, which is not encrypted")


def read(url: str, *, most: int, seconds: float) -> tuple[int, bytes]:
    """The status and the content of a small file at `url`, by one try of about `seconds`.

    Of a larger file come `most` bytes and a few more. Raises TransientError, HopelessError.
    """
    if problem := addresses.problem_of(url):
        raise HopelessError(problem)
    deadline = time.monotonic() + seconds
    data = b""
    with open_client(timeout=seconds / bounds.WINDOW_TIMEOUTS) as client, errors_as_ours():
        with client.stream("GET", url, extensions={CONTENT: Content()}) as answer:
            for piece in answer.iter_raw(bounds.PIECE):
                data += piece
                if len(data) > most:
                    break
                if time.monotonic() > deadline:
                    raise TransientError(f"it takes longer than {seconds:.0f} s")
            return answer.status_code, data


# ---- errors


@contextmanager
def errors_as_ours() -> Iterator[None]:
    """Inside, httpx's errors become TransientError or HopelessError, by what they mean."""
    try:
        yield
    except RefusedRedirectError as problem:
        raise HopelessError(f"the server is refused: {problem}. Check the address.") from problem
    except httpx.TooManyRedirects as problem:
        raise HopelessError(f"the server redirects more than {MOST_REDIRECTS} times.", UnreachableError) from problem
    except bounds.OutOfBoundsError as problem:
        raise HopelessError(f"the server is given up: {problem}.", UnreachableError) from problem
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as problem:
        raise HopelessError(f"this is no address that can be asked ({_said(problem)}). Correct it.") from problem
    except (httpx.LocalProtocolError, UnicodeEncodeError) as problem:
        raise HopelessError(
            "the request cannot be sent: a token or an address has a character that it must not have. Copy the token "
            "again."
        ) from problem
    except httpx.ProxyError as problem:
        if "407" in str(problem):
            raise _needs_password() from problem
        raise TransientError(f"the proxy fails ({_said(problem)})", unreached=True) from problem
    except httpx.RequestError as problem:
        unreached = isinstance(problem, (httpx.ConnectError, httpx.ConnectTimeout))
        raise TransientError(f"{type(problem).__name__} ({_said(problem)})", unreached=unreached) from problem
    except httpx.StreamError as problem:
        raise TransientError(f"{type(problem).__name__}") from problem


def _said(problem: Exception) -> str:
    """The text of an error on one line: a server may have written a part of it."""
    return printable(str(problem))


def _needs_password() -> HopelessError:
    names = ", ".join(_variables_set()) or "the proxy's variable"
    return HopelessError(
        f"the proxy asks for a user and a password (407). Write them into {names}: http://USER:PASSWORD@HOST:PORT."
    )


# ---- the transport


class _Transport(httpx.BaseTransport):
    """One bounded transport for each proxy of the environment, and one without."""

    def __init__(self, slowest: int, *, has_files: bool = False) -> None:
        self.slowest, self.has_files, self.head = slowest, has_files, bounds.Head()
        self.inner: dict[str | None, httpx.HTTPTransport] = {}
        self.lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        variable, proxy = proxy_for(request.url)
        with self.lock:
            if proxy not in self.inner:
                self.inner[proxy] = self._open(variable, proxy)
        with self.head.awaited():
            answer = self.inner[proxy].handle_request(request)
        if answer.status_code == 407 and proxy is not None:
            answer.close()
            raise _needs_password()
        content = request.extensions.get(CONTENT)
        if self.has_files and "json" not in answer.headers.get("content-type", ""):
            content = Content()
        return _bounded(request, answer, content)

    def _open(self, variable: str, proxy: str | None) -> httpx.HTTPTransport:
        # Raises HopelessError for what the environment says and nobody can use.
        try:
            transport = httpx.HTTPTransport(proxy=proxy)
        except ImportError as problem:
            raise HopelessError(
                f"{variable}={addresses.shown(proxy or '')}: SOCKS proxies are not supported here. Set {variable} to "
                "an http:// proxy, or unset it."
            ) from problem
        except (ValueError, httpx.InvalidURL) as problem:
            raise _no_proxy(variable, proxy or "", _said(problem)) from problem
        except (OSError, ssl.SSLError) as problem:
            raise HopelessError(
                "SSL_CERT_FILE or SSL_CERT_DIR names certificates that cannot be read "
                f"({type(problem).__name__}). Correct it, or unset it."
            ) from problem
        pool: Any = transport._pool
        pool._network_backend = bounds.Backend(self.head, self.slowest)  # httpx has no option for it
        return transport

    def close(self) -> None:
        for transport in self.inner.values():
            transport.close()


def _bounded(request: httpx.Request, answer: httpx.Response, content: Content | None) -> httpx.Response:
    """`answer` with a body that keeps to its bounds."""
    timeout = request.extensions.get("timeout", {}).get("read") or TIMEOUT_S
    headers = httpx.Headers(answer.headers)
    most: int | None = bounds.MOST_ASIDE
    deadline: float | None = time.monotonic() + bounds.ANSWER_TIMEOUTS * timeout
    packed = False
    encoding = headers.pop("content-encoding", "identity").strip().lower()
    if content is not None and answer.status_code in (200, 206):
        most, deadline = content.most, None  # as it is: an archive may be announced as gzip, and is wanted so
    else:
        packed = encoding in ("gzip", "x-gzip")
        if answer.is_success:
            most = bounds.MOST_ANSWER
            if not packed and encoding not in ("", "identity") and request.method != "HEAD":
                answer.close()
                raise httpx.DecodingError(f"its answer is packed ({encoding[:40]}), though nobody asked for that")
    assert isinstance(answer.stream, httpx.SyncByteStream)
    body = bounds.Body(answer.stream, most=most, deadline=deadline, packed=packed)
    return httpx.Response(answer.status_code, headers=headers, stream=body, extensions=answer.extensions)


# ---- proxies


def proxy_for(url: httpx.URL) -> tuple[str, str | None]:
    """The variable and the address of the proxy for `url`; ("", None) without one. Raises HopelessError."""
    proxies: Mapping[str, str] = urllib.request.getproxies_environment()
    for scheme in (url.scheme, "all"):
        proxy = proxies.get(scheme, "").strip()
        if not proxy:
            continue
        host = f"[{url.host}]" if ":" in url.host else url.host
        if urllib.request.proxy_bypass(host if url.port is None else f"{host}:{url.port}"):
            return "", None
        variable = f"{scheme.upper()}_PROXY"
        address = proxy if "://" in proxy else f"http://{proxy}"
        if problem := addresses.problem_of(address, schemes=PROXY_SCHEMES):
            raise _no_proxy(variable, address, problem)
        return variable, address
    return "", None


def _no_proxy(variable: str, proxy: str, problem: str) -> HopelessError:
    return HopelessError(
        f"{variable}={addresses.shown(proxy)}: {problem}. Write a proxy as http://HOST:PORT, or unset {variable}."
    )


def _variables_set() -> list[str]:
    proxies = urllib.request.getproxies_environment()
    return [f"{scheme.upper()}_PROXY" for scheme in ("http", "https", "all") if proxies.get(scheme)]
