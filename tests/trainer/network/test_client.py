"""Servers that never end, lie or lead astray, and environments that nobody can use: each within its bound, by name.

The bounds scale with the timeout of a request (`trainer.network.bounds`), so that nothing here waits for long.
"""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import time
import zlib

import httpx
import pytest

from entrypoint.fetch import http
from tests.support import raw_server
from tests.support.raw_server import RawServer, answer, drip, flood
from trainer.network import bounds
from trainer.network.client import open_client
from trainer.spec.errors import KilnError, SettingsError, UnreachableError

TIMEOUT = 0.2
QUICK = http.RetryPolicy(budget=0.4, unreached=0.2, first_wait=0.05, longest_wait=0.2, timeout=TIMEOUT)
PATIENT = http.RetryPolicy(budget=60.0, unreached=0.3, first_wait=0.05, longest_wait=0.2)  # on a busy machine, too
HEAD = b"HTTP/1.1 200 OK\r\n"
WITHOUT_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in WITHOUT_PROXIES:
        monkeypatch.delenv(name, raising=False)


def ask(url, *, headers=None, retries=PATIENT):
    """A question, as all parts of the entrypoint ask it: the JSON of the answer."""

    def call():
        found = client.get(url, headers=headers or {})
        http.check_status(found, "the server")
        return http.parse_json(found, "the server")

    with open_client(timeout=retries.timeout) as client:
        return http.persist(call, what="X=y", retries=retries)


def given_up(script, *, within, retries=PATIENT):
    """The error that a question ends with, after at most `within` seconds, and the server."""
    with RawServer(script) as server:
        began = time.monotonic()
        with pytest.raises(KilnError) as problem:
            ask(f"{server.url}/a", retries=retries)
        assert time.monotonic() - began < within
        assert str(problem.value).startswith("X=y: "), problem.value
        return problem.value, server


def chunked():
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


ENDLESS = {
    "a byte now and then in the head": lambda c, h: drip(HEAD, every=0.1, piece=b"x"),
    "a header now and then": lambda c, h: drip(HEAD, every=0.1, piece=b"a: b\r\n"),
    "headers without end": lambda c, h: flood(HEAD, b"a: b\r\n" * 1000),
    "one header without end": lambda c, h: flood(HEAD + b"a: ", b"b" * 60000),
    "a status line without end": lambda c, h: flood(b"HTTP/1.1 200 ", b"b" * 60000),
    "a byte now and then in the body": lambda c, h: drip(HEAD + b"\r\n", every=0.1),
    "the same with a length": lambda c, h: drip(HEAD + b"Content-Length: 1000000\r\n\r\n", every=0.1),
    "chunks of a byte": lambda c, h: drip(chunked(), every=0.1, piece=b"1\r\nx\r\n"),
    "a chunk's extension without end": lambda c, h: drip(chunked() + b"1;", every=0.1),
    "a trailer without end": lambda c, h: drip(chunked() + b"0\r\n", every=0.1),
    "silence": lambda c, h: drip(b"", every=100),
    "silence after the head": lambda c, h: drip(HEAD + b"Content-Length: 9\r\n\r\n", every=100),
    "100 Continue now and then": lambda c, h: drip(b"", every=0.1, piece=b"HTTP/1.1 100 Continue\r\n\r\n"),
    "102 Processing without end": lambda c, h: flood(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 1000),
    "a body without end": lambda c, h: flood(HEAD + b"\r\n", bytes(2**18)),
    "chunks without end": lambda c, h: flood(chunked(), b"10000\r\n" + bytes(2**16) + b"\r\n"),
    "ten gigabytes, announced": lambda c, h: flood(HEAD + b"Content-Length: 10000000000\r\n\r\n", bytes(2**18)),
    "a refusal without end": lambda c, h: flood(b"HTTP/1.1 404 Not Found\r\n\r\n", bytes(2**18)),
    "a redirect with a body without end": lambda c, h: flood(b"HTTP/1.1 302 F\r\nLocation: /b\r\n\r\n", bytes(2**18)),
    "nonsense": lambda c, h: b"\x00\xff\r\n\r\n" * 10,
    "nothing": lambda c, h: b"",
    "another protocol": lambda c, h: b"SSH-2.0-OpenSSH_9.6\r\n",
    "two lengths": lambda c, h: HEAD + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
    "a length of less than nothing": lambda c, h: HEAD + b"Content-Length: -3\r\n\r\nabcde",
    "less than the length": lambda c, h: HEAD + b"Content-Length: 30\r\n\r\nabcde",
    "more digits than a number may have": lambda c, h: answer(b"[" + b"9" * 5000 + b"]"),
    "deep nesting": lambda c, h: answer(b"[" * 100_000),
    "a page": lambda c, h: answer(b"<html>Log in to the WiFi</html>", content_type="text/html"),
    "half a letter": lambda c, h: answer(b'{"a": "\xff"}'),
    "no content": lambda c, h: answer(status="204 No Content", content_length="-"),
    "packed by what is not known": lambda c, h: answer(b"abc", content_encoding="br"),
    "packed twice": lambda c, h: answer(gzip.compress(gzip.compress(b"{}")), content_encoding="gzip, gzip"),
    "packed badly": lambda c, h: answer(b"abcdefgh", content_encoding="gzip"),
}


@pytest.mark.parametrize("script", ENDLESS.values(), ids=ENDLESS)
def test_a_question_ends_whatever_the_server_does(script, monkeypatch):
    monkeypatch.setattr(bounds, "MOST_ANSWER", 2**22)
    problem, _ = given_up(script, within=8, retries=QUICK)
    assert isinstance(problem, UnreachableError)


def test_a_bomb_is_unpacked_no_further_than_an_answer_may_be_large(monkeypatch):
    """A gigabyte in a megabyte."""
    monkeypatch.setattr(bounds, "MOST_ANSWER", 2**22)
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    problem, server = given_up(lambda c, h: answer(bomb, content_encoding="gzip"), within=10)
    assert "larger than 4 MiB" in str(problem) and len(server.heads) == 1


def test_an_answer_that_is_packed_once_is_read():
    body = gzip.compress(json.dumps({"a": 1}).encode())
    with RawServer(lambda c, h: answer(body, content_encoding="gzip")) as server:
        assert ask(server.url) == {"a": 1}
        assert "accept-encoding: identity" in server.heads[0].lower()


def test_a_slow_line_is_waited_for(monkeypatch):
    """Slower than the floor in its pauses, faster on the whole."""
    monkeypatch.setattr(bounds, "SLOWEST", 1000)
    body = json.dumps("x" * 20_000).encode()
    pieces = [body[i : i + 2000] for i in range(0, len(body), 2000)]
    retries = http.RetryPolicy(budget=60.0, timeout=0.3)

    def script(connection, head):
        yield HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
        for piece in pieces:
            time.sleep(0.15)
            yield piece

    with RawServer(script) as server:
        assert len(ask(server.url, retries=retries)) == 20_000


# ---- tries


@pytest.mark.parametrize("asked", ["0", "00", "-1", "0.0", "Thu, 01 Jan 1970 00:00:00 GMT", "soon", "٣", ""])
def test_a_server_cannot_make_us_hurry(asked):
    retries = http.RetryPolicy(budget=1.0, first_wait=0.1, longest_wait=0.4, timeout=TIMEOUT)
    script = lambda c, h: answer(status="429 Busy", retry_after=asked.encode().decode("latin-1"))  # noqa: E731
    problem, server = given_up(script, within=5, retries=retries)
    assert isinstance(problem, UnreachableError) and len(server.heads) <= 12


@pytest.mark.parametrize("asked", ["31536000", "9" * 5000, "Fri, 31 Dec 2999 23:59:59 GMT"])
def test_a_server_that_asks_for_a_year_is_not_waited_for(asked):
    problem, server = given_up(lambda c, h: answer(status="503 Busy", retry_after=asked), within=10)
    assert isinstance(problem, UnreachableError) and len(server.heads) == 1 and "asks to wait" in str(problem)


def test_a_reset_that_the_limit_announces_is_no_reason_to_hurry():
    script = lambda c, h: answer(status="429 Busy", ratelimit='"api";r=0;t=0')  # noqa: E731
    assert len(given_up(script, within=5, retries=QUICK)[1].heads) <= 20


def test_tries_are_counted_even_where_each_makes_progress(monkeypatch):
    monkeypatch.setattr(http, "MOST_TRIES", 5)
    tries = []

    def fail():
        tries.append(1)
        raise http.TransientError("again")

    retries = http.RetryPolicy(budget=10.0, first_wait=0.001, longest_wait=0.001)
    with pytest.raises(UnreachableError, match="5 attempts"):
        http.persist(fail, what="x", retries=retries, progressed=lambda: True)
    assert len(tries) == 5


USUAL_MOST_S = {  # seconds that a question may take, with the policy that jobs have
    "a byte a second in the head": (lambda c, h: drip(HEAD, every=1.0), 160),
    "a byte a second in the body": (lambda c, h: drip(HEAD + b"\r\n", every=1.0), 160),
    "silence": (lambda c, h: drip(b"", every=100), 140),
    "Retry-After: 0": (lambda c, h: answer(status="429 Busy", retry_after="0"), 130),
    "a loop of redirects": (lambda c, h: answer(status="302 F", location="/a"), 5),
    "ten gigabytes": (lambda c, h: flood(HEAD + b"\r\n", bytes(2**20)), 20),
}


@pytest.mark.slow
def test_the_usual_policy_ends_in_minutes(monkeypatch):
    monkeypatch.setattr(raw_server, "STILL_S", 1000.0)

    def one(name):
        script, most = USUAL_MOST_S[name]
        began = time.monotonic()
        problem, server = given_up(script, within=most, retries=http.USUAL)
        return f"{name}: {time.monotonic() - began:.0f} s, {len(server.heads)} requests, exit {problem.exit_code}"

    with concurrent.futures.ThreadPoolExecutor(len(USUAL_MOST_S)) as pool:
        print("\n".join(pool.map(one, USUAL_MOST_S)))


# ---- redirects


def test_a_loop_of_redirects_ends_after_ten():
    problem, server = given_up(lambda c, h: answer(status="302 F", location="/a"), within=10)
    assert isinstance(problem, UnreachableError) and "redirects more than 10 times" in str(problem)
    assert len(server.heads) == 11


def test_redirects_that_never_repeat_end_as_well():
    problem, server = given_up(
        lambda c, h: answer(status="307 T", location=f"/{len(h)}{time.monotonic_ns()}"), within=2
    )
    assert isinstance(problem, UnreachableError) and len(server.heads) == 11


@pytest.mark.parametrize(
    "place",
    [
        *("file:///etc/passwd", "ftp://example.com/x", "gopher://x/", "data:text/plain,x", "javascript:1"),
        *("http://[::1", "http://a:99999/", "http://a:b/", "http://a..b/", "http://a b/"),
        *("http://1.2.3.999/", "http:// /", f"http://{'a' * 64}.com/", f"http://x/{'a' * 9000}", "unix:///run/docker"),
    ],
)
def test_redirects_to_what_is_no_address_of_a_server_are_refused(place):
    problem, server = given_up(lambda c, h: answer(status="302 F", location=place), within=10)
    assert isinstance(problem, SettingsError) and len(server.heads) == 1


def test_nothing_leads_from_https_to_http():
    from trainer.network.client import RefusedRedirectError, _check_redirect

    def redirect(origin, place):
        answered = httpx.Response(302, headers={"location": place}, request=httpx.Request("GET", origin))
        _check_redirect(answered)

    for place in ("http://a.example/x", "http://b.example/x"):
        with pytest.raises(RefusedRedirectError, match="not encrypted"):
            redirect("https://a.example/", place)
    for origin, place in (("http://a.example/", "https://a.example/"), ("https://a.example/", "/x")):
        redirect(origin, place)


def test_a_token_does_not_go_to_another_host():
    with RawServer(lambda c, h: answer(b"{}")) as other:
        target = other.url.replace("127.0.0.1", "localhost")
        with RawServer(lambda c, h: answer(status="302 F", location=f"{target}/x")) as server:
            assert ask(f"{server.url}/a", headers={"Authorization": "Bearer canary"}) == {}
            assert "canary" in server.heads[0] and "canary" not in other.heads[0]


def test_a_token_does_not_go_to_another_port():
    with RawServer(lambda c, h: answer(b"{}")) as other:
        with RawServer(lambda c, h: answer(status="302 F", location=f"{other.url}/x")) as server:
            assert ask(f"{server.url}/a", headers={"Authorization": "Bearer canary"}) == {}
            assert "canary" not in other.heads[0]


@pytest.mark.parametrize("token", ["hf_\u00e4", "hf_\nX-Evil: 1", "hf_\x00", "hf_\udce4"])
def test_a_token_that_no_header_can_hold_is_told_without_it(token):
    with RawServer(lambda c, h: answer(b"{}")) as server:
        with pytest.raises(SettingsError, match="Copy the token again") as problem:
            ask(server.url, headers={"Authorization": f"Bearer {token}"})
        assert "hf_" not in str(problem.value) and server.heads == []


def test_what_a_server_writes_reaches_no_terminal_raw():
    problem, _ = given_up(
        lambda c, h: b"HTTP/1.1 200 \x1b[2J\x07oops\r\n\x1b]0;x\x07: y\r\n\r\n", within=5, retries=QUICK
    )
    assert "\x1b" not in str(problem) and "\x07" not in str(problem) and "\n" not in str(problem)


# ---- addresses and the environment


@pytest.mark.parametrize(
    "address",
    [
        *("", "x", "//x", "ftp://x/", "http://", "http:///x", "http://[::1", "http://[x]/", "http://a:99999/"),
        *("http://a:x/", "http://a..b/", "http://\x00/", "http://a\nb/", "http://a b/", "http://-/", "http://a:0/"),
        *(f"http://{'a' * 64}/", f"http://{'a.' * 200}/", "http://1.2.3.256/", "http://\udce4/", "http://\\x/"),
        *("https://a:-1/", "http://%00/", "http://a:" + "1" * 5000, "http://" + "a" * 10_000),
    ],
)
def test_what_is_no_address_is_told_before_anything_is_asked(address):
    from trainer.network.addresses import problem_of, shown

    assert problem_of(address)
    assert shown(address).isprintable() or not shown(address)


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:8080",
        "https://hf-mirror.com/",
        "http://[::1]:1/x",
        "http://a_b/c d.zip",
        "https://bücher.de/ä",
    ],
)
def test_addresses_that_can_be_asked(address):
    from trainer.network.addresses import problem_of

    assert problem_of(address) is None


@pytest.mark.parametrize(
    "value",
    [
        *("socks5://127.0.0.1:1", "socks5h://127.0.0.1:1", "socks4://x:1", "ftp://x:1", "http://", "http://[::1"),
        *("http://a:99999", "x:y:z", "http://a..b:1", "\x01", "http://user:canary@[x:1", "://", "http://a:b"),
    ],
)
@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY", "http_proxy"])
def test_a_proxy_that_cannot_be_one_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name.upper()) as problem:
        ask("http://127.0.0.1:1/")
    assert "canary" not in str(problem.value)


@pytest.mark.parametrize(
    "value", ["*", "127.0.0.1", "x,127.0.0.1", "127.0.0.0/8,127.0.0.1", " 127.0.0.1 ,,", "[,127.0.0.1"]
)
def test_hosts_that_need_no_proxy(monkeypatch, value):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", value)
    with RawServer(lambda c, h: answer(b"{}")) as server:
        assert ask(server.url) == {}


@pytest.mark.parametrize("value", ["[", "http://[", "*.x.*", "\x01", "a" * 10_000, ",,,", "::1/129"])
def test_odd_lists_of_hosts_are_lists_without_this_one(monkeypatch, value):
    with RawServer(lambda c, h: answer(b'{"by": "proxy"}')) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removeprefix("http://"))
        monkeypatch.setenv("NO_PROXY", value)
        assert ask("http://example.invalid/x") == {"by": "proxy"}
        assert proxy.paths() == ["http://example.invalid/x"]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_a_password_is_told(monkeypatch, scheme):
    with RawServer(lambda c, h: answer(status="407 Proxy Authentication Required")) as proxy:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy.url)
        with pytest.raises(SettingsError, match=f"407.*{scheme.upper()}_PROXY"):
            ask(f"{scheme}://example.invalid/")
        assert len(proxy.heads) == 1


PROXIES = {
    "nonsense": lambda c, h: b"\x00\x01\x02\r\n\r\n",
    "a page": lambda c, h: answer(b"<html>", "200 OK"),
    "403": lambda c, h: answer(status="403 Forbidden"),
    "502": lambda c, h: answer(status="502 Bad Gateway"),
    "silence": lambda c, h: drip(b"", every=100),
    "drips": lambda c, h: drip(HEAD, every=0.1),
    "closes": lambda c, h: b"",
}


@pytest.mark.parametrize("script", PROXIES.values(), ids=PROXIES)
def test_a_proxy_that_fails_is_unreachable(monkeypatch, script):
    with RawServer(script) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        with pytest.raises(UnreachableError):
            ask("https://example.invalid/", retries=QUICK)


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_cannot_be_read_are_named(monkeypatch, tmp_path, name):
    wrong = tmp_path / "ca.pem"
    wrong.write_text("no certificate")
    monkeypatch.setenv(name, str(wrong) if name == "SSL_CERT_FILE" else str(tmp_path / "missing"))
    with pytest.raises((SettingsError, UnreachableError)):
        ask("https://127.0.0.1:1/")


def test_a_server_without_encryption_behind_https_is_unreachable():
    with RawServer(lambda c, h: answer(b"{}")) as server:
        with pytest.raises(UnreachableError):
            ask(server.url.replace("http:", "https:"), retries=QUICK)
