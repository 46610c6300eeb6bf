"""Downloads from servers that lie, crawl or never end: the file is right, or a named error comes within its bound."""

from __future__ import annotations

import hashlib
import re
import time

import pytest

from entrypoint.fetch import http
from tests.support.raw_server import RawServer, answer, drip, flood
from trainer.network.client import open_client
from trainer.spec.errors import DataError, KilnError, SettingsError, UnreachableError

# Tries are counted here, so that a busy machine gives the same result; time ends only what is slow on purpose.
COUNTED = http.RetryPolicy(budget=60.0, first_wait=0.01, longest_wait=0.02, timeout=10.0)
TRIES = 12
SHORT = http.RetryPolicy(budget=0.5, first_wait=0.01, longest_wait=0.02, timeout=10.0)
DATA = bytes(range(256)) * 40  # 10,240 bytes
SIZE, DIGEST, HALF = len(DATA), hashlib.sha256(DATA).hexdigest(), len(DATA) // 2


@pytest.fixture
def brought(tmp_path, monkeypatch):
    """Download from a script; returns the content."""
    monkeypatch.setattr(http, "MOST_TRIES", TRIES)

    def bring(script, *, size=SIZE, digest=DIGEST, retries=COUNTED, **more):
        def refuse(response):
            raise SettingsError(f"refused with {response.status_code}")

        with RawServer(script) as server, open_client(timeout=retries.timeout) as client:
            bring.server = server
            job = http.Download(
                f"{server.url}/f", tmp_path / "f", tmp_path / "f.part", "X=f", size=size, digest=digest, **more
            )
            http.download(client, job, retries=retries, refuse=refuse)
        return (tmp_path / "f").read_bytes()

    return bring


def refused(brought, script, *, within=20.0, retries=COUNTED, **options):
    began = time.monotonic()
    with pytest.raises(KilnError) as problem:
        brought(script, retries=retries, **options)
    assert time.monotonic() - began < within
    return problem.value


def offset(head):
    found = re.search(r"range: bytes=(\d+)-", head, re.IGNORECASE)
    return int(found[1]) if found else 0


def ranged(head, data=DATA, **changes):
    """What an honest server answers to a request with a range."""
    start = offset(head)
    if not start:
        return answer(data, **changes)
    said = {"content_range": f"bytes {start}-{len(data) - 1}/{len(data)}"} | changes
    return answer(data[start:], "206 Partial Content", **said)


def cut(whole, at):
    """An answer whose connection ends after `at` bytes of its body."""
    head, _, body = whole.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n" + body[:at]


def first_half_then(second):
    """A script that gives the first half, and then what `second` gives for a request's head."""

    def script(connection, head):
        return second(head) if offset(head) else cut(answer(DATA), HALF)

    return script


def test_a_file_in_two_parts(brought):
    assert brought(first_half_then(ranged)) == DATA
    assert len(brought.server.heads) == 2


def test_a_whole_file_in_the_place_of_its_second_part(brought):
    assert brought(first_half_then(lambda head: answer(DATA))) == DATA


WRONG_RANGES = {
    "none": None,
    "another place": f"bytes 0-{len(DATA) - 1}/{len(DATA)}",
    "a later place": f"bytes {HALF + 1}-{len(DATA) - 1}/{len(DATA)}",
    "another size": f"bytes {HALF}-{len(DATA)}/{len(DATA) + 1}",
    "backwards": f"bytes {HALF}-3/{len(DATA)}",
    "words": "bytes a-b/c",
    "too many digits": f"bytes {'9' * 5000}-{'9' * 5000}/{'9' * 5000}",
    "another unit": f"lines {HALF}-9/10",
    "begins alike": f"bytes {HALF}0-{HALF}1/{len(DATA)}",
}


@pytest.mark.parametrize("said", WRONG_RANGES.values(), ids=WRONG_RANGES)
def test_a_part_of_another_place_is_not_appended(brought, said):
    """It is begun anew; a server that goes on like this is given up."""
    tries = []

    def second(head):
        tries.append(head)
        changes = {"content_range": said} if said else {"content_range": "-"}
        return answer(b"wrong" * 100, "206 Partial Content", **changes)

    assert refused(brought, first_half_then(second)).exit_code == 75 and tries
    tries.clear()

    def once(head):
        return second(head) if not tries else ranged(head)

    assert brought(first_half_then(once)) == DATA and len(tries) == 1


def test_a_file_that_changes_between_its_parts_is_begun_anew(brought):
    other = bytes(reversed(DATA))
    answers = iter([cut(answer(DATA, etag='"a"'), HALF)])

    def script(connection, head):
        return next(answers, None) or ranged(head, other, etag='"b"')

    options = {"size": None, "digest": None}
    problem = refused(brought, script, version='"a"', **options)
    assert problem.exit_code == 75 and "has changed on the server" in str(problem)
    assert brought(lambda c, h: ranged(h, other, etag='"b"'), version='"b"', **options) == other


@pytest.mark.parametrize("answered", ["204 No Content", "205 Reset", "203 Other", "304 Not Modified", "226 IM Used"])
def test_a_status_that_holds_no_file(brought, answered):
    extra = {"content_length": "-"} if answered.startswith(("204", "304")) else {}
    problem = refused(brought, lambda c, h: answer(status=answered, **extra), size=None, digest=None)
    assert isinstance(problem, (SettingsError, UnreachableError)) and len(brought.server.heads) == 1


def test_no_part_at_all_for_ever(brought):
    """416, after a first half: begun anew each time, and no progress."""
    problem = refused(brought, first_half_then(lambda head: answer(status="416 Range Not Satisfiable")))
    assert problem.exit_code == 75 and len(brought.server.heads) == TRIES


def test_more_than_was_announced_is_cut_off(brought):
    problem = refused(brought, lambda c, h: flood(b"HTTP/1.1 200 OK\r\n\r\n", DATA))
    assert problem.exit_code == 75 and "twice" in str(problem)
    assert len(brought.server.heads) == 2 and brought.server.sent < 5e7


def test_less_than_was_announced_again_and_again(brought):
    problem = refused(brought, lambda c, h: answer(DATA[:10] if not offset(h) else b""))
    assert problem.exit_code == 75 and len(brought.server.heads) == TRIES


def test_a_file_without_end_is_refused(brought):
    script = lambda c, h: flood(b"HTTP/1.1 200 OK\r\n\r\n", bytes(2**16))  # noqa: E731
    assert isinstance(refused(brought, script, size=None, digest=None, most=2**20), DataError)


def test_a_byte_for_each_request_is_no_progress(brought, monkeypatch):
    monkeypatch.setattr(http, "MOST_TRIES", 10_000)

    def script(connection, head):
        return cut(ranged(head), 1)

    problem = refused(brought, script, retries=SHORT)
    assert problem.exit_code == 75 and len(brought.server.heads) < 200


def test_the_same_part_again_and_again_is_no_progress(brought, monkeypatch):
    monkeypatch.setattr(http, "MOST_TRIES", 10_000)

    def script(connection, head):
        return answer(status="416 No") if offset(head) else cut(answer(DATA), HALF)

    assert refused(brought, script, retries=SHORT).exit_code == 75


def test_a_byte_a_moment_is_no_progress(brought):
    script = lambda c, h: drip(b"HTTP/1.1 200 OK\r\nContent-Length: 10240\r\n\r\n", every=0.1)  # noqa: E731
    slow = http.RetryPolicy(budget=1.0, first_wait=0.02, longest_wait=0.1, timeout=0.3)
    problem = refused(brought, script, retries=slow)
    assert problem.exit_code == 75 and "less than 4096 bytes/s" in str(problem)


def test_a_line_that_breaks_often_arrives(brought):
    """Each try brings a little, faster than the slowest line."""
    assert brought(lambda c, h: cut(ranged(h), 1000)) == DATA
    assert len(brought.server.heads) == 11


def test_an_archive_that_is_announced_as_packed_is_kept_as_it_is(brought):
    assert brought(lambda c, h: answer(DATA, content_encoding="gzip")) == DATA


def test_wrong_bytes_twice(brought):
    problem = refused(brought, lambda c, h: answer(bytes(len(DATA))))
    assert problem.exit_code == 75 and "not the announced one" in str(problem) and len(brought.server.heads) == 2


def test_a_redirect_in_the_middle_keeps_the_range(brought):
    def script(connection, head):
        if " /f " in head:
            return answer(status="302 Found", location="/g")
        return ranged(head) if offset(head) else cut(answer(DATA), HALF)

    assert brought(script) == DATA and brought.server.paths() == ["/f", "/g", "/f", "/g"]
