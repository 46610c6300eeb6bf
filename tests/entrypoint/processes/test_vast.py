"""ON_FINISH on an instance of Vast.ai: a stand-in of its API, the real client, and the supervisor around a job."""

import os
import signal
import threading
import time

import pytest

from entrypoint.fetch import http
from entrypoint.processes import places, supervise
from entrypoint.processes.supervise import Times
from tests.support.vast import KEY, NUMBER, vast_server
from trainer.process import guard

QUICK = Times(
    linger=0.3, farewell=3.0, retries=http.RetryPolicy(budget=3.0, unreached=0.2, first_wait=0.02, timeout=2.0)
)
LIMITED = guard.Ending(143, 0.0, signal.SIGTERM, limit_reached=True)


@pytest.fixture
def vast():
    """Its end sends the signal to this process, as docker's stop does."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    with vast_server() as server:
        server.on_end = lambda: threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        yield server
    signal.signal(signal.SIGTERM, before)


def supervised(vast, code_or_ending, **environment):
    def run(job):
        return code_or_ending if isinstance(code_or_ending, guard.Ending) else guard.Ending(job(), 0.0)

    return supervise.supervised(lambda: code_or_ending, vast.environment | environment, times=QUICK, run=run)


@pytest.mark.parametrize(
    ("action", "code", "state", "request_line"),
    [
        ("stop", 0, "stopped", f'PUT /api/v0/instances/{NUMBER}/ {{"state":"stopped"}}'),
        ("terminate", 0, "gone", f"DELETE /api/v0/instances/{NUMBER}/ "),
        ("terminate", 75, "stopped", f'PUT /api/v0/instances/{NUMBER}/ {{"state":"stopped"}}'),  # not done: kept
        ("stop", 78, "stopped", f'PUT /api/v0/instances/{NUMBER}/ {{"state":"stopped"}}'),
        ("wait", 0, "stopped", f'PUT /api/v0/instances/{NUMBER}/ {{"state":"stopped"}}'),
        ("exit", 0, "running", None),
    ],
)
def test_each_word_does_what_it_says(vast, caplog, action, code, state, request_line):
    caplog.set_level("INFO")
    began = time.monotonic()
    assert supervised(vast, code, ON_FINISH=action) == code
    assert vast.state == state and [line.replace(": ", ":") for line in vast.asked] == [request_line] * bool(
        request_line
    )
    assert ("BILLS THIS INSTANCE" in caplog.text) == (action == "exit") and KEY not in caplog.text
    assert ("ON_FINISH=wait stops the instance in" in caplog.text) == (action == "wait")
    assert action != "wait" or time.monotonic() - began >= QUICK.linger


def test_without_a_word_the_container_exits_and_the_bill_is_named(vast, caplog):
    assert supervised(vast, 0) == 0
    assert vast.asked == [] and f"vastai stop instance {NUMBER}" in caplog.text and "so does ON_FINISH" in caplog.text


def test_idle_stays_until_a_signal_and_names_the_bill(vast, caplog):
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert supervised(vast, 0, ON_FINISH="idle") == 0
    assert vast.asked == [] and "BILLS THIS INSTANCE" in caplog.text


@pytest.mark.parametrize("code", [143, 130])
def test_whoever_stops_the_job_ends_the_container_himself(vast, code):
    assert supervised(vast, code, ON_FINISH="stop") == code
    assert vast.asked == []


@pytest.mark.parametrize("action", ["stop", "terminate", "wait"])
def test_a_limit_of_money_stops_the_instance(vast, action):
    assert supervised(vast, LIMITED, ON_FINISH=action) == 143
    assert vast.state == "stopped"


def test_what_may_pass_is_asked_again(vast):
    vast.failing += [(500, b""), (429, b"{}")]
    assert supervised(vast, 0, ON_FINISH="stop") == 0
    assert vast.state == "stopped" and len(vast.asked) == 3


def test_a_destroy_whose_answer_was_lost_is_done(vast):
    vast.failing.append((502, b"<html>"))
    vast.state = "gone"
    assert places.asked_to_end("terminate", vast.environment, QUICK.retries) and len(vast.asked) == 2


@pytest.mark.parametrize(
    ("changes", "failing", "words"),
    [
        ({"CONTAINER_API_KEY": f"{KEY}-old"}, None, "CONTAINER_API_KEY is not, or no longer, that of this container"),
        ({"CONTAINER_API_KEY": ""}, None, "ON_FINISH=stop needs CONTAINER_ID and CONTAINER_API_KEY"),
        ({"CONTAINER_API_KEY": "a\nb"}, None, "needs CONTAINER_ID and CONTAINER_API_KEY"),
        ({"CONTAINER_ID": "../1", "VAST_CONTAINERLABEL": "label"}, None, "needs CONTAINER_ID and CONTAINER_API_KEY"),
        ({"CONTAINER_ID": "5", "VAST_CONTAINERLABEL": ""}, None, "(404, "),
        ({"VAST_URL": "ftp://x"}, None, "VAST_URL=ftp://x: "),
        ({"VAST_URL": "http://127.0.0.1:9"}, None, "/api/v0/instances/4242/"),
        ({}, (200, b'{"success": false, "msg": "busy"}'), "busy"),
        ({}, (200, b"[1]"), "[1]"),
        ({}, (302, b""), "(302, no reason given)"),
    ],
)
def test_what_cannot_be_done_is_said_and_no_key_is_shown(vast, caplog, capfd, changes, failing, words):
    caplog.set_level("DEBUG")
    if failing is not None:
        vast.failing.append(failing)
    began = time.monotonic()
    assert supervised(vast, 0, ON_FINISH="stop", **changes) == 0
    assert words in caplog.text and vast.state == "running" and time.monotonic() - began < 20
    assert "VAST.AI BILLS THIS INSTANCE UNTIL IT IS STOPPED" in caplog.text
    assert KEY not in caplog.text + "".join(capfd.readouterr())


def test_the_instance_is_known_by_its_label_too(vast):
    own = {**vast.environment, "CONTAINER_ID": ""}
    assert places.asked_to_end("stop", own, QUICK.retries) and vast.state == "stopped"
