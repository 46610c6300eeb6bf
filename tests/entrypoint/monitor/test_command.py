"""`python -m entrypoint monitor OUTPUT_PATH`: the page of a folder, as a command."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrypoint.monitor.beside import page_address
from tests.support.finished_runs import finished_run
from tests.support.monitor import Page
from tests.support.programs import basic_environment

ROOT = Path(__file__).parents[3]


def start(*arguments, **more):
    environment = {**basic_environment(), "PYTHONPATH": ":".join(filter(None, [str(ROOT), *sys.path])), **more}
    command = [sys.executable, "-m", "entrypoint", "monitor", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )


def address_of(process):
    line = process.stderr.readline()
    found = re.search(r"http://localhost:(\d+)/(?:#([\w-]+))?", line)
    assert found, line + process.stderr.read()
    return int(found[1]), found[2]


def test_the_command_says_where_the_page_is_and_ends_with_ctrl_c(tmp_path):
    finished_run(tmp_path)
    process = start(tmp_path, "--port", "0", "--price-per-hour", "3.6")
    port, token = address_of(process)
    page = Page(port, headers={"Authorization": f"Bearer {token}"})
    assert len(token) >= 20 and page.ask("/health").status == 200 and page.ask("/health", headers={}).status == 401
    told = {event.name: event.data for event in page.events()}
    assert told["status"]["cost"] == pytest.approx(0.09) and told["status"]["actions"] == []
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_a_given_token_is_used_and_not_printed(tmp_path):
    finished_run(tmp_path)
    process = start(tmp_path, "--port", "0", MONITOR_TOKEN="my-own-token-1234")
    port, token = address_of(process)
    assert token is None
    assert Page(port, headers={"Authorization": "Bearer my-own-token-1234"}).ask("/health").status == 200
    process.terminate()
    assert process.wait(10) == 143 and "my-own" not in process.stderr.read()


def test_only_this_computer_reaches_it(tmp_path):
    finished_run(tmp_path)
    process = start(tmp_path, "--port", "0")
    port, _ = address_of(process)
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    assert f"0100007F:{port:04X} " in listening and f"00000000:{port:04X} 00000000:0000 0A" not in listening
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("arguments", "more", "code"),
    [
        ([], {}, 64),
        (["--port", "70000", "x"], {}, 64),
        (["/nowhere/at/all"], {}, 78),
        (["{out}"], {"MONITOR_TOKEN": "short"}, 78),
    ],
)
def test_what_cannot_be_done_ends_with_a_documented_exit_code(tmp_path, arguments, more, code):
    finished_run(tmp_path)
    process = start(*(argument.format(out=tmp_path) for argument in arguments), **more)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == code and "Traceback" not in printed and "short" not in printed.replace("too short", "")


def test_a_port_that_is_taken_is_named(tmp_path):
    finished_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(tmp_path, "--port", port)
        printed = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and str(port) in printed and "another port" in printed


def test_the_address_on_a_rented_pod_is_that_of_its_proxy():
    assert page_address({}, port=8675, token="t") == "http://localhost:8675/#t"
    assert page_address({"RUNPOD_POD_ID": "abc"}, port=8675) == "https://abc-8675.proxy.runpod.net/"


def test_the_command_of_the_page_is_not_imported_by_a_job():
    code = "import sys, entrypoint.__main__; print({'uvicorn', 'starlette', 'anyio'} & set(sys.modules))"
    environment = {**basic_environment(), "PYTHONPATH": ":".join(sys.path)}
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "set()" and time.monotonic() - began < 60, found.stderr
