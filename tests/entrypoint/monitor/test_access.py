"""Who may see the monitor page, what each address gives, and what none gives."""

import concurrent.futures
import json
import os
import re
import socket
import threading
import time

import pytest

from entrypoint.monitor import files
from entrypoint.monitor.access import Access, Bucket
from entrypoint.monitor.actions import Actions
from entrypoint.monitor.app import HEADERS, Site
from entrypoint.monitor.stream import TICK_S
from entrypoint.report import samples as small_images
from tests.support.finished_runs import finished_run
from tests.support.monitor import TOKEN, WITH_TOKEN, serving
from trainer.process.vitals import SAVE, STOP, VARIABLE, Vitals
from trainer.storage.own_files import DATASET_VIEW as DATASET

BEHIND = ("/events", "/sample/step-00000020-00.png", "/small/step-00000020-00.png", "/file/x.safetensors", "/images")
WRONG = {"Authorization": "Bearer not-the-token-at-all"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    finished_run(folder)
    (folder.parent / "secret.txt").write_text("outside")
    (folder / "other.safetensors").write_text("not of the run")
    with serving(folder) as running:
        running.folder = folder
        yield running


@pytest.fixture
def fresh(tmp_path):
    finished_run(tmp_path)
    with serving(tmp_path) as running:
        yield running


# ---- the token


@pytest.mark.parametrize("path", BEHIND)
def test_nothing_is_served_without_the_token(fresh, path):
    for headers in ({}, WRONG, {"Cookie": f"kiln_monitor_{fresh.port}=0"}, {"Authorization": "Bearer "}):
        assert fresh.ask(path, headers=headers).status == 401, headers
    if path != "/events":  # which does not end
        assert fresh.ask(path).status == 200


PUBLIC = {"/page/{name}", "/enter"}  # the door itself, and what it is drawn with


def routes(live):
    """Every address that the page has, with names that exist, and the methods that it takes."""
    known = {"name": "step-00000020-00.png", "number": "0"}
    for route in Site(live, Access(TOKEN, port=1), None).routes():
        path = re.sub(r"\{(\w+)(:\w+)?\}", lambda match: known[match[1]], route.path)
        for method in route.methods - {"HEAD"}:
            yield route.path, path, method


@pytest.mark.parametrize("headers", [{}, WRONG], ids=["no token", "a wrong token"])
def test_no_address_of_the_page_is_open(fresh, headers):
    """Whatever addresses there will be."""
    closed = 0
    for template, path, method in routes(fresh.live):
        if template not in PUBLIC:
            answer = fresh.ask(path, method=method, body=b"" if method == "POST" else None, headers=headers)
            assert answer.status == 401 and b"zot" not in answer.body, (method, path)
            closed += 1
    assert closed >= 9


def test_no_address_that_changes_something_takes_a_request_of_another_site(fresh):
    """Nor with the token, which a browser would send along as a cookie."""
    changing = [(path, method) for _, path, method in routes(fresh.live) if method != "GET"]
    assert len(changing) == 2
    for path, method in changing:
        for foreign in ({"Sec-Fetch-Site": "cross-site"}, {"Host": "own", "Origin": "https://evil.example"}):
            sent = {**WITH_TOKEN, "X-Kiln-Page": "1", **foreign}
            assert fresh.ask(path, method=method, body=b"{}", headers=sent).status == 403, (path, foreign)


def test_the_token_is_not_taken_from_the_address(fresh):
    assert fresh.ask(f"/health?token={TOKEN}", headers={}).status == 401


def test_without_the_token_there_is_a_door_that_holds_nothing_of_the_job(fresh):
    door = fresh.ask("/", headers={})
    assert door.status == 401 and b"Token of this job" in door.body and b"mini-flux" not in door.body
    assert fresh.ask("/page/enter.js", headers={}).status == 200


def test_the_token_is_changed_for_a_cookie_that_scripts_and_other_sites_do_not_get(fresh):
    body = json.dumps({"token": TOKEN}).encode()
    entered = fresh.ask("/enter", method="POST", body=body, headers={})
    cookie = entered.headers["set-cookie"]
    assert entered.status == 204 and "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Secure" not in cookie
    assert TOKEN not in cookie and "Path" not in cookie
    own = {"Cookie": cookie.partition(";")[0]}
    assert fresh.ask("/", headers=own).status == 200 and b"Overview" in fresh.ask("/", headers=own).body
    behind_tls = {"X-Forwarded-Proto": "https"}
    assert "Secure" in fresh.ask("/enter", method="POST", body=body, headers=behind_tls).headers["set-cookie"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"token": 1}', b'{"token": "x"}', b"[" * 4000, b"x" * 10**6])
def test_what_is_no_token_opens_nothing(fresh, body):
    assert fresh.ask("/enter", method="POST", body=body, headers={}).status == 401


def test_the_comparison_takes_all_of_the_text():
    access = Access(TOKEN, port=1)
    assert access.is_token(TOKEN) and not access.is_token(TOKEN[:-1]) and not access.is_token(f"{TOKEN}x")
    assert not access.is_token("\udcff") and not access.is_token("")
    assert access.allows({"authorization": f"bearer {TOKEN}"}) and access.allows({}) is None
    assert access.allows({"cookie": f"kiln_monitor_1={TOKEN}"}) is False  # the cookie is not the token
    assert Access("another-token-12345", port=1).cookie != access.cookie


def test_a_cookie_is_for_one_process_and_one_session(fresh):
    """Jobs with the same MONITOR_TOKEN do not take each other's."""
    access = Access(TOKEN, port=1)
    assert access.allows({"cookie": f"kiln_monitor_1={access.cookie}"})
    assert Access(TOKEN, port=1).allows({"cookie": f"kiln_monitor_1={access.cookie}"}) is False
    body = json.dumps({"token": TOKEN}).encode()
    entered = fresh.ask("/enter", method="POST", body=body, headers={})
    assert "Max-Age" not in entered.headers["set-cookie"] and "Expires" not in entered.headers["set-cookie"]


@pytest.mark.parametrize("odd", ["a[1]=x", "{}=1", "x y=1", "kiln", "=", 'q="', "\xe4=\xf6"])
def test_odd_cookies_of_other_programs_on_this_host_change_nothing(odd):
    access = Access(TOKEN, port=1)
    assert access.allows({"cookie": f"{odd}; kiln_monitor_1={access.cookie}; {odd}"})
    assert access.allows({"cookie": odd}) is None


def test_an_old_cookie_finds_the_door_while_others_try_tokens(fresh):
    for _ in range(40):
        last = fresh.ask("/health", headers=WRONG).status
    assert last == 429
    door = fresh.ask("/", headers={"Cookie": f"kiln_monitor_{fresh.port}=old"})
    assert door.status == 401 and b"Token of this job" in door.body
    assert fresh.ask("/", headers=WRONG).status == 429


# ---- limits


def test_a_thousand_wrong_tokens_in_a_second_are_refused_and_a_right_one_is_served(fresh):
    began = time.monotonic()

    def wrong(number):
        return fresh.ask("/health", headers={"Authorization": f"Bearer wrong-{number}"}).status

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = pool.map(wrong, range(1000))
        right = [fresh.ask("/health").status for _ in range(20)]
        statuses = list(asked)
    took = time.monotonic() - began
    allowed = 20 + took + 1  # what the bucket holds, and what runs into it meanwhile
    assert set(statuses) == {401, 429} and statuses.count(401) <= allowed
    assert statuses.count(429) >= 1000 - allowed and set(right) == {200}
    body = json.dumps({"token": TOKEN}).encode()
    assert fresh.ask("/enter", method="POST", body=body, headers={}).status == 204
    assert fresh.ask("/enter", method="POST", body=b"{}", headers={}).status == 429


def test_a_thousand_requests_of_the_owner_at_once_are_served_and_a_viewer_is_told_meanwhile(fresh):
    def asked(number):
        return fresh.ask(BEHIND[1 + number % 4]).status

    seen = fresh.stream(until="never")
    next(seen)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        statuses = pool.map(asked, range(1000))
        with (fresh.live.served.out / "run.log").open("a") as file:
            file.write("2026-01-01 00:00:00,000 INFO a line of this time\n")
        while "a line of this time" not in str(next(seen).data):
            pass
        assert set(statuses) == {200}


def test_a_bucket_refills_with_time():
    now = [0.0]
    bucket = Bucket(most=2, per_second=0.5, clock=lambda: now[0])
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now[0] = 2.0
    assert [bucket.take() for _ in range(2)] == [True, False]
    now[0] = 1000.0
    assert [bucket.take() for _ in range(3)] == [True, True, False]


def test_a_request_of_another_site_changes_nothing(fresh):
    body = json.dumps({"token": TOKEN}).encode()
    host = {"Host": f"127.0.0.1:{fresh.port}"}
    for foreign in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {**host, "Sec-Fetch-Site": "cross-site", "Origin": f"http://127.0.0.1:{fresh.port}"},
        {**host, "Origin": "https://evil.example"},
        {**host, "Origin": "null"},
        {**host, "Origin": f"http://127.0.0.1:{fresh.port + 1}"},
    ):
        refused = fresh.ask("/enter", method="POST", body=body, headers={**WITH_TOKEN, **foreign})
        assert refused.status == 403 and "set-cookie" not in refused.headers, foreign
    for own in (
        {"Sec-Fetch-Site": "same-origin"},
        # A proxy that asks for another host, and does not say for which it was asked.
        {"Sec-Fetch-Site": "same-origin", "Host": "inside:1", "Origin": "https://outside.example"},
        {"Sec-Fetch-Site": "none", "Host": "inside:1", "Origin": "https://outside.example"},
        {**host, "Origin": f"http://127.0.0.1:{fresh.port}"},
        {
            "Host": "inside:1",
            "X-Forwarded-Host": "pod-8675.proxy.runpod.net",
            "Origin": "https://pod-8675.proxy.runpod.net",
        },
    ):
        assert fresh.ask("/enter", method="POST", body=body, headers=own).status == 204, own


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_but_reading_is_possible(page, method):
    for path in ("/", "/file/x.safetensors", "/sample/step-00000020-00.png", "/events"):
        assert page.ask(path, method=method, body=b"").status == 405
    assert (page.folder / "x.safetensors").is_file()


def test_headers_and_requests_without_end_are_cut_off(page):
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ")
        answered = b""
        try:
            for _ in range(64):
                connection.sendall(b"y" * 4096)
            answered = connection.recv(100)
        except OSError:  # the server has closed it
            return
    assert answered.startswith(b"HTTP/1.1 4") or answered == b""


# ---- what is served


def test_every_answer_has_the_policy(page):
    for path in ("/", "/page/app.js", "/nothing", "/file/x.safetensors", "/sample/step-00000020-00.png"):
        found = page.ask(path).headers
        for name, value in HEADERS.items():
            assert found[name] == value, (path, name)
    policy = HEADERS["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "server" not in page.ask("/").headers


def test_the_page_loads_nothing_from_elsewhere_and_holds_no_style_or_script_of_its_own(page):
    for name in ("/", "/page/style.css", "/page/app.js", "/page/samples.js", "/page/dom.js", "/page/charts.js"):
        text = page.ask(name).body.decode()
        addresses = text.replace("http://www.w3.org/2000/svg", "")
        assert "http" not in addresses.replace("https", "http").replace("httpOnly", ""), name
        assert "innerHTML" not in text and "style=" not in text and "onclick=" not in text and "eval(" not in text
    index = page.ask("/").body.decode()
    # Behind a proxy the page is in some folder: no address begins at the root.
    assert 'href="/' not in index and 'src="/' not in index and '"/' not in page.ask("/page/app.js").body.decode()


ESCAPES = [
    "..", "../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "%2e%2e%2fsecret.txt", "..%5csecret.txt", ".",
    "....//secret.txt", "%00", "x.safetensors%00.png", "/etc/passwd", "%2fetc%2fpasswd", "", "other.safetensors",
    "state", "run.json", "..%252fsecret.txt", "sample/../plan.json", "step-00000020-00.png/../../status.json",
    ".lease", "logs", "x.safetensors/", "%ff%fe", "step-00000020-00.png%0a", "app.py", "../app.py", "..%2fapp.py",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_and_nothing_is_listed(page, name):
    for folder in ("file", "sample", "small", "page"):
        answer = page.ask(f"/{folder}/{name}")
        if answer.status in (307, 308):  # to the same without a slash at the end
            continue
        assert answer.status in (400, 404), (folder, name, answer.body[:80])
        assert b"outside" not in answer.body and b"root:" not in answer.body


def test_a_link_or_a_fifo_by_a_name_of_the_run_is_not_served(fresh, tmp_path):
    (tmp_path.parent / "outside.txt").write_text("outside")
    for path in (tmp_path / "x.safetensors", tmp_path / "sample" / "step-00000020-00.png", tmp_path / "run.log"):
        path.unlink(missing_ok=True)
    (tmp_path / "x.safetensors").symlink_to(tmp_path.parent / "outside.txt")
    (tmp_path / "sample" / "step-00000020-00.png").symlink_to(tmp_path.parent / "outside.txt")
    os.mkfifo(tmp_path / "run.log")
    for name in ("file/x.safetensors", "sample/step-00000020-00.png", "small/step-00000020-00.png", "file/run.log"):
        assert fresh.ask(f"/{name}").status == 404, name
    assert {event.name for event in fresh.events()} >= {"status", "samples"}  # and nothing has waited for it


@pytest.mark.parametrize("name", ["run.log", "metrics.jsonl", "plan.json", "status.json", "sample", DATASET])
def test_no_link_of_the_folder_is_followed_by_what_viewers_are_told(tmp_path, name):
    """A file or folder of the run is moved outside, and a link is left in its place."""
    out = tmp_path / "out"
    out.mkdir()
    finished_run(out)
    (out / "run.log").write_text("a line\n")
    (out / name).rename(tmp_path / "outside")
    (out / name).symlink_to(tmp_path / "outside")
    with serving(out) as page:
        told = {event.name: event.data for event in page.events()}
        for kind in ("sample", "small"):
            assert (page.ask(f"/{kind}/step-00000020-00.png").status == 404) == (name == "sample")
    gone = {
        "run.log": not told.get("log", {}).get("text"),
        "metrics.jsonl": told["history"]["columns"]["step"] == [],
        "plan.json": told["plan"]["settings"] == [],
        "status.json": told["status"]["phase"] == "preparing",
        "sample": told["samples"]["images"] == [],
        DATASET: told["dataset"]["images"] == 0,
    }
    assert gone[name], told
    assert name not in told["checkpoints"]["files"]


def test_a_run_outside_of_the_folder_is_not_shown(tmp_path):
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    finished_run(tmp_path / "elsewhere")
    (out / "runs" / "x").symlink_to(tmp_path / "elsewhere")
    status = json.loads((tmp_path / "elsewhere" / "status.json").read_text())
    (out / "status.json").write_text(json.dumps({**status, "run_folder": "runs/x"}))
    with serving(out) as page:
        told = {event.name: event.data for event in page.events()}
        assert (
            told["plan"]["settings"] == []
            and told["samples"]["images"] == []
            and told["history"]["columns"]["step"] == []
        )
        assert page.ask("/file/metrics.jsonl").status == 404
        assert page.ask("/sample/step-00000020-00.png").status == 404


def test_a_folder_may_be_named_by_a_link(tmp_path):
    (tmp_path / "out").mkdir()
    finished_run(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with serving(tmp_path / "link") as page:
        assert page.ask("/file/x.safetensors").status == 200
        assert page.ask("/small/step-00000020-00.png").status == 200


def test_files_come_as_downloads_whole_and_in_ranges(page):
    whole = (page.folder / "x.safetensors").read_bytes()
    answer = page.ask("/file/x.safetensors")
    assert answer.body == whole and answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/octet-stream" and len(whole) > 20
    part = page.ask("/file/x.safetensors", headers={**WITH_TOKEN, "Range": "bytes=10-19"})
    assert part.status == 206 and part.body == whole[10:20]
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    for asked, expected in (("bytes=7-", whole[7:]), ("bytes=-5", whole[-5:]), ("bytes=0-99999", whole)):
        assert page.ask("/file/x.safetensors", headers={**WITH_TOKEN, "Range": asked}).body == expected
    for asked in ("bytes=99999-", "bytes=5-2", "bytes=-", "lines=1-2", "bytes=1-2,4-5"):
        assert page.ask("/file/x.safetensors", headers={**WITH_TOKEN, "Range": asked}).status == 416
    other = {**WITH_TOKEN, "Range": "bytes=10-", "If-Range": '"another"'}
    assert page.ask("/file/x.safetensors", headers=other).body == whole  # the file has changed meanwhile
    same = {**WITH_TOKEN, "If-None-Match": answer.headers["etag"]}
    assert page.ask("/file/x.safetensors", headers=same).status == 304


def test_samples_come_as_images_whole_and_small(page):
    path = page.folder / "sample" / "step-00000020-00.png"
    answer = page.ask(f"/sample/{path.name}")
    assert answer.body == path.read_bytes() and answer.headers["content-type"] == "image/png"
    small = page.ask(f"/small/{path.name}")
    assert small.body.startswith(b"\xff\xd8") and small.headers["content-type"] == "image/jpeg"


def test_of_the_dataset_only_images_of_the_run_are_shown(page):
    rows = page.ask("/images").json()
    assert rows["total"] == 2 and rows["rows"][0]["number"] == 0 and "file" not in rows["rows"][0]
    for first in ("-1", "x", "", "1e9", "9" * 400):
        assert page.ask(f"/images?first={first}").status == 200
    for number in ("0", "2", "99999999999999999999", "-1", "x", "..%2f0"):
        assert page.ask(f"/picture/{number}").status == 404


def test_pictures_that_are_slow_hold_up_nothing_else(fresh, monkeypatch):
    """More of them at once than there are threads for everything else: one is made after another."""
    at_once = []

    def slow(_path, _width):
        at_once.append(len(at_once))
        drawing.wait(20)
        return b"\xff\xd8"

    drawing = threading.Event()
    monkeypatch.setattr(small_images, "thumbnail", slow)
    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(fresh.ask, f"/small/step-000000{step}-0{prompt}.png")
                 for step in (20, 40) for prompt in (0, 1) for _ in range(14)]  # fmt: skip
        try:
            while not at_once:
                time.sleep(0.01)
            time.sleep(0.5)
            began = time.monotonic()
            assert fresh.ask("/file/x.safetensors").status == 200 and time.monotonic() - began < 5
            assert len(at_once) == 1
        finally:
            drawing.set()
        assert {answer.result().status for answer in asked} == {200}


def test_what_the_job_cannot_do_now_is_refused_with_the_reason(tmp_path):
    finished_run(tmp_path)
    vitals, path = Vitals.make()
    own = {**WITH_TOKEN, "X-Kiln-Page": "1"}
    with serving(tmp_path, actions=Actions({VARIABLE: path})) as page:

        def asked(name, phase):
            status = json.loads((tmp_path / "status.json").read_text())
            (tmp_path / "status.json").write_text(json.dumps({**status, "phase": phase}))
            time.sleep(TICK_S)
            answer = page.ask(f"/action/{name}", method="POST", body=b"", headers=own)
            return answer.status, answer.body.decode()

        assert asked("save", "done") == (409, "The job has ended (done).\n")
        assert asked("stop", "failed")[0] == 409 and vitals.read(STOP) is None
        assert asked("save", "caching") == (409, "The job is not training now (phase: caching).\n")
        assert vitals.read(SAVE) is None
        assert asked("save", "training") == (202, "")
        assert asked("save", "training") == (409, "A save was asked for less than 30 s ago.\n")
        assert asked("nothing", "training")[0] == 404
        assert asked("stop", "caching")[0] == 202 and vitals.read(STOP) is not None
    vitals.close()


def test_head_reads_no_file_and_holds_no_stream(page, monkeypatch):
    def pieces(*_):
        raise AssertionError("the file is read")

    monkeypatch.setattr(files, "_pieces", pieces)
    size = (page.folder / "x.safetensors").stat().st_size
    answer = page.ask("/file/x.safetensors", method="HEAD")
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, str(size), b"")
    part = page.ask("/file/x.safetensors", method="HEAD", headers={**WITH_TOKEN, "Range": "bytes=0-9"})
    assert (part.status, part.headers["content-length"]) == (206, "10")
    began = time.monotonic()
    events = page.ask("/events", method="HEAD")
    assert events.status == 200 and events.headers["content-type"].startswith("text/event-stream")
    with socket.create_connection(("127.0.0.1", page.port), timeout=5) as connection:
        connection.sendall(f"HEAD /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode())
        connection.sendall(b"Connection: close\r\n\r\n")
        while connection.recv(4096):
            pass
    assert time.monotonic() - began < 5
