"""A whole miniature job with its monitor page: it is shown while it trains, and can be asked for three things."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.support.monitor import Page

LONG = {"PARAMS_MAX_STEPS": "4000", "PARAMS_SAVE_EVERY_N_STEPS": "0"}
PROMPTS = json.dumps(["a circle --w 64 --h 64 --s 2 --d 3"])
OWN = {"X-Kiln-Page": "1"}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def page_of(process, port, *, seconds=60):
    """The page, as soon as it answers, opened with the token in the address that the job has printed."""
    deadline = time.monotonic() + seconds
    while True:
        found = re.search(rf"http://localhost:{port}/#([\w-]{{20,}})", process.printed())
        if found:
            page = Page(port, headers={"Authorization": f"Bearer {found[1]}"})
            try:
                if page.ask("/health").status == 200:
                    return page
            except OSError:
                pass
        assert process.poll() is None and time.monotonic() < deadline, process.printed()
        time.sleep(0.1)


def wait_for(condition, process, *, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.printed()
        time.sleep(0.05)


def server_of(port):
    """The process that listens on `port`."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
            inodes.add(f"socket:[{fields[9]}]")
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry) in inodes for entry in folder.iterdir()):
                return int(folder.parent.name)
        except OSError:
            continue
    return None


def test_a_job_shows_itself_and_does_what_its_page_asks(job):
    """Save now, sample now, stop: each once, after the step that was running, and the job can be resumed."""
    port = free_port()
    process = job.start(**LONG, MONITOR_PORT=str(port), SAMPLE_PROMPTS=PROMPTS, PRICE_PER_HOUR="1")
    page = page_of(process, port)
    job.wait_for_step(process, 3)
    wait_for(lambda: len(status_of(page)["actions"]) == 3, process)
    told = {event.name: event.data for event in page.events()}
    assert told["status"]["phase"] == "training" and told["status"]["total"] == 4000 and told["status"]["cost"] > 0
    assert told["history"]["columns"]["loss"][0] > 0 and told["plan"]["reasons"] and "INFO" in told["log"]["text"]
    assert told["history"]["columns"]["memory_gib"][0] > 0 and told["history"]["columns"]["prodigy_d"][0] > 0

    assert page.ask("/action/save", method="POST", body=b"").status == 403  # without the page's own header
    assert page.ask("/action/save", method="POST", body=b"", headers=OWN).status == 401  # without the token
    foreign = {**page.headers, **OWN, "Sec-Fetch-Site": "cross-site"}
    assert page.ask("/action/stop", method="POST", body=b"", headers=foreign).status == 403
    assert page.ask("/action/rm", method="POST", body=b"", headers={**page.headers, **OWN}).status == 404
    assert page.ask("/action/stop", headers={**page.headers, **OWN}).status == 405
    assert not list(job.out.glob("*.safetensors"))

    assert page.ask("/action/save", method="POST", body=b"", headers={**page.headers, **OWN}).status == 202
    wait_for(lambda: list(job.out.glob("x-step*.safetensors")), process)
    assert page.ask("/action/sample", method="POST", body=b"", headers={**page.headers, **OWN}).status == 202
    wait_for(lambda: list((job.out / "sample").glob("step-*.png")), process)
    wait_for(lambda: status_of(page)["phase"] == "training", process)
    before = max(row["step"] for row in job.metrics())
    job.wait_for_step(process, before + 5)
    assert len(list(job.out.glob("x-step????????.safetensors"))) == 1  # once asked, once done
    assert len(list((job.out / "sample").glob("step-*.png"))) == 1
    assert page.ask("/action/stop", method="POST", body=b"", headers={**page.headers, **OWN}).status == 202
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "The monitor page asks this job to stop" in printed, printed
    status = job.status()
    assert status["phase"] == "stopped" and status["saved_step"] == status["step"] == job.metrics()[-1]["step"]
    token = page.headers["Authorization"].split()[1].encode()
    assert [path for path in job.folder.rglob("*") if path.is_file() and token in path.read_bytes()] == []


def status_of(page):
    return next(event.data for event in page.events() if event.name == "status")


@pytest.mark.slow
def test_what_the_page_has_asked_for_changes_no_weight(job, tmp_path):
    """The job that saved and sampled in between ends with the same bytes."""
    asked = {"PARAMS_MAX_STEPS": "200", "PARAMS_SAVE_EVERY_N_STEPS": "0", "SAMPLE_PROMPTS": PROMPTS}
    assert job.run(**asked)[0] == 0
    first = (job.out / "x.safetensors").read_bytes()
    port = free_port()
    out = tmp_path / "second"
    job.environment["OUTPUT_PATH"] = str(out)
    process = job.start(**asked, MONITOR_PORT=str(port))
    page = page_of(process, port)
    job.wait_for_step(process, 1)
    for name in ("save", "sample"):
        assert page.ask(f"/action/{name}", method="POST", body=b"", headers={**page.headers, **OWN}).status == 202
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert list(out.glob("x-step*.safetensors")) and list((out / "sample").glob("step-*.png")), printed
    assert (out / "x.safetensors").read_bytes() == first


def test_a_page_that_dies_is_started_again_and_a_job_goes_on_without_it(job):
    port = free_port()
    process = job.start(**LONG, MONITOR_PORT=str(port))
    page = page_of(process, port)
    job.wait_for_step(process, 2)
    killed = server_of(port)
    os.kill(killed, signal.SIGKILL)
    before = max(row["step"] for row in job.metrics())
    job.wait_for_step(process, before + 5)
    wait_for(lambda: server_of(port) not in (None, killed), process)
    wait_for(lambda: answers(page), process)  # with the same token
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "It is started again. Training is not affected." in printed
    assert server_of(port) is None


def answers(page):
    try:
        return page.ask("/health").status == 200
    except OSError:
        return False


def test_a_port_that_is_taken_is_named_and_the_job_ends_as_it_would(job):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        code, printed = job.run(PARAMS_MAX_STEPS="150", PARAMS_SAVE_EVERY_N_STEPS="0", MONITOR_PORT=str(port))
    assert code == 0 and f"MONITOR_PORT={port} is taken by another program" in printed, printed
    assert printed.count("is taken") == 1


@pytest.mark.slow
def test_a_given_token_is_nowhere_in_what_the_job_prints_or_writes(job, tmp_path):
    port, token = free_port(), "cAnaryTOKEN4567890"
    asked = {"PARAMS_MAX_STEPS": "200", "PARAMS_SAVE_EVERY_N_STEPS": "0"}
    process = job.start(**asked, MONITOR_PORT=str(port), MONITOR_TOKEN=token)
    page = Page(port, headers={"Authorization": f"Bearer {token}"})
    wait_for(lambda: answers(page), process)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(token.encode() in command for command in commands)
    server = Path("/proc", str(server_of(port)), "environ").read_bytes()
    assert token.encode() not in server
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and token not in printed and f"http://localhost:{port}/\n" in printed, printed
    files = [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert files == []


@pytest.mark.parametrize("arguments", [("--check",), ()])
def test_a_token_that_can_be_guessed_is_refused(job, arguments):
    code, printed = job.run(*arguments, MONITOR_TOKEN="guessme123")
    assert code == 78 and "MONITOR_TOKEN is too short" in printed and "guessme123" not in printed


def test_a_check_and_a_job_that_is_done_open_no_page(job):
    port = str(free_port())
    assert "monitor page" not in job.run("--check", MONITOR_PORT=port)[1]
    assert job.run(PARAMS_MAX_STEPS="2")[0] == 0
    code, printed = job.run(PARAMS_MAX_STEPS="2", MONITOR_PORT=port)
    assert code == 0 and "This job is done" in printed and "monitor page" not in printed
