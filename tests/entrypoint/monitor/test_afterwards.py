"""The page of a job that has ended, while ON_FINISH=wait or idle keeps its container."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import threading
import time

import pytest

from entrypoint.monitor import beside
from entrypoint.processes import supervise
from entrypoint.processes.supervise import Times
from tests.support.finished_runs import finished_run
from tests.support.monitor import TOKEN, Page
from trainer.process.vitals import VARIABLE, Vitals

LONG = 60.0  # seconds; the tests end it by a signal, as whoever stops the container does


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.fixture
def ended(tmp_path, port):
    """A job in a container, without a secret that the log would hide: its environment."""
    finished_run(tmp_path)
    job = {"BASE_MODEL": "mini-flux", "DATASET_NAME": str(tmp_path), "OUTPUT_PATH": str(tmp_path)}
    return {"PATH": os.environ["PATH"], **job, "MONITOR_PORT": str(port), "MONITOR_TOKEN": TOKEN}


def supervised(environment, times, code=0):
    serving = lambda seconds: beside.showing_after(environment, seconds)  # noqa: E731
    return supervise.supervised(lambda: code, environment, times=times, serving=serving)


def while_it_waits(environment, port, look, *, times):
    """The exit code, and what `look(page)` returned as soon as the page answered; then the container is stopped."""
    page = Page(port)

    def client():
        deadline = time.monotonic() + LONG / 2
        while time.monotonic() < deadline:
            try:
                page.ask("/health")
                return look(page)
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the page did not come")

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            found = pool.submit(client)
            found.add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGTERM))
            code = supervised(environment, times)
            return code, found.result()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("action", ["wait", "idle"])
def test_it_serves_the_results_and_the_log_says_until_when_and_where(ended, port, tmp_path, caplog, action):
    caplog.set_level("INFO")
    vitals, path = Vitals.make()

    def look(page):
        status = next(event.data for event in page.events() if event.name == "status")
        headers = {**page.headers, "X-Kiln-Page": "1"}
        asked = page.ask("/action/stop", method="POST", body=b"", headers=headers)
        return page.ask("/file/x.safetensors").body, status, asked.status, page.ask("/health", headers={}).status

    environment = {**ended, "ON_FINISH": action, VARIABLE: path}
    code, (lora, status, asked, stranger) = while_it_waits(environment, port, look, times=Times(linger=LONG, page=LONG))
    vitals.close()
    assert code == 0 and lora == (tmp_path / "x.safetensors").read_bytes()
    assert status["phase"] == "done" and status["run"] == "x" and status["actions"] == []
    assert asked == 404 and stranger == 401
    until = re.search(r"The monitor page is served until (.{16}) UTC, for downloads: (\S+)", caplog.text)
    assert until[2] == f"http://localhost:{port}/" and TOKEN not in caplog.text
    ends = time.strptime(until[1], "%Y-%m-%d %H:%M")
    assert 0 <= time.mktime(ends) - time.mktime(time.gmtime()) + 60 <= LONG + 60
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_page_that_is_over_leaves_the_container_where_it_is(ended, port, caplog):
    caplog.set_level("INFO")
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    assert supervised({**ended, "ON_FINISH": "idle"}, Times(page=0.5)) == 0
    signal.signal(signal.SIGTERM, before)
    assert "The monitor page has ended. python -m entrypoint monitor serves it again." in caplog.text
    assert time.monotonic() - began >= 3


@pytest.mark.parametrize("changes", [{"MONITOR_PORT": "0"}, {"MONITOR_PORT": "many"}, {"MONITOR_TOKEN": "short"}])
def test_there_is_none_where_it_is_off_or_the_settings_cannot_be_used(ended, caplog, changes):
    caplog.set_level("INFO")
    assert supervised({**ended, "ON_FINISH": "wait", **changes}, Times(linger=0.3)) == 0
    assert "monitor page" not in caplog.text


@pytest.mark.parametrize("action", ["exit", "stop"])
def test_there_is_none_where_nobody_waits(ended, caplog, action):
    caplog.set_level("INFO")
    assert supervised({**ended, "ON_FINISH": action}, Times(linger=LONG)) == 0
    assert "monitor page" not in caplog.text


def test_its_images_are_those_of_the_plan(ended, port, tmp_path):
    """They are on this machine still: the plan is this job's own."""
    view = (tmp_path / "dataset-images.jsonl").read_text().splitlines()
    plan = json.loads((tmp_path / "plan.json").read_text())
    folder = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    folder.mkdir()
    (folder / "a.png").write_bytes((tmp_path / "sample" / "step-00000020-00.png").read_bytes())
    plan["data"]["datasets"][0]["subsets"][0]["source"]["path"] = str(folder)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    row = {**json.loads(view[1]), "file": "a.png"}
    (tmp_path / "dataset-images.jsonl").write_text(f"{view[0]}\n{json.dumps(row)}\n")
    environment = {**ended, "ON_FINISH": "idle"}
    _, picture = while_it_waits(environment, port, lambda page: page.ask("/picture/0"), times=Times(page=LONG))
    assert picture.status == 200 and picture.headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({}, "http://localhost:8675/#word"),
        ({"RUNPOD_POD_ID": "pod1"}, "https://pod1-8675.proxy.runpod.net/#word"),
        ({"PUBLIC_IPADDR": "192.0.2.7", "VAST_TCP_PORT_8675": "40123"}, "http://192.0.2.7:40123/#word"),
        ({"PUBLIC_IPADDR": "192.0.2.7", "VAST_TCP_PORT_8080": "40123"}, "http://localhost:8675/#word"),
    ],
)
def test_the_address_is_the_one_from_outside(environment, address):
    assert beside.page_address(environment, port=8675, token="word") == address
