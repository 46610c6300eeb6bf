"""An API that is none of RunPod's: each answer ends in a named error, and the key goes nowhere else."""

import pytest

from entrypoint.fetch.http import RetryPolicy
from entrypoint.runpod.api import RunPod
from tests.support.raw_server import RawServer, answer, flood
from trainer.spec.errors import GatedError, KilnError, SettingsError, UnreachableError

QUICK = RetryPolicy(budget=0.3, unreached=0.2, first_wait=0.02, longest_wait=0.05, timeout=5.0)
KEY = "rpa_canary"
NONSENSE = (b"[]", b"{}", b"7", b"null", b'{"pods": 3}', b'{"pods": [3]}', b"<html>", b"[" * 100_000, b"\xff", b"")

ODD_REASONS = (b'{"title": 1, "detail": [], "errors": 7}', b'{"title": "\\u001b[2J", "detail": "x"}')


@pytest.mark.parametrize("body", NONSENSE)
def test_nonsense_in_the_place_of_a_list(body):
    with RawServer(lambda c, h: answer(body)) as server, pytest.raises(UnreachableError):
        RunPod(KEY, server.url, QUICK).pods()


@pytest.mark.parametrize("body", [*NONSENSE, *ODD_REASONS])
@pytest.mark.parametrize("status", ["400 Bad", "401 No", "404 None", "418 Teapot", "302 Found"])
def test_nonsense_in_the_place_of_a_reason(status, body):
    with RawServer(lambda c, h: answer(body, status)) as server:
        with pytest.raises((SettingsError, GatedError)) as problem:
            RunPod(KEY, server.url, QUICK).pods()
    assert "\x1b" not in str(problem.value) and KEY not in str(problem.value)


def test_a_redirect_is_not_followed_with_the_key():
    with RawServer(lambda c, h: answer(b'{"pods": []}')) as other:
        with RawServer(lambda c, h: answer(status="307 T", location=f"{other.url}/x")) as server:
            with pytest.raises(SettingsError, match="307"):
                RunPod(KEY, server.url, QUICK).pods()
        assert other.heads == []


def test_an_answer_without_end():
    with RawServer(lambda c, h: flood(b"HTTP/1.1 400 Bad\r\n\r\n", bytes(2**18))) as server:
        with pytest.raises(UnreachableError, match="larger than 1 MiB"):
            RunPod(KEY, server.url, QUICK).pods()


@pytest.mark.parametrize("host", ["", "x", "ftp://x", "http://[::1", "http://a:99999", "http://a..b", "http://user@"])
def test_an_address_that_is_none(host):
    with pytest.raises(SettingsError, match="RUNPOD_API_BASE_URL"):
        RunPod.from_environment({"RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": host}, retries=QUICK).pods()


@pytest.mark.parametrize("key", ["rpa_ä", "rpa_\n", "rpa_\0"])
def test_a_key_that_no_header_can_hold(key):
    with RawServer(lambda c, h: answer(b"{}")) as server, pytest.raises(KilnError) as problem:
        RunPod(key, server.url, QUICK).pods()
    assert "rpa_" not in str(problem.value) and server.heads == []


@pytest.mark.parametrize("data", [b"data: {}", b"data: x", b"data: [", b"data: " + b"[" * 100_000, b"id: 1\r\ndata: 7"])
def test_log_lines_that_are_none(data):
    events = data + b'\r\n\r\nid: 2\r\ndata: {"line": "a\\u001b[2Jb"}\r\n\r\n'
    with RawServer(lambda c, h: answer(events)) as server:
        lines = list(RunPod(KEY, server.url, QUICK).log_lines("p", tail=1))
    assert lines == [("2", "a\\x1b[2Jb")]
