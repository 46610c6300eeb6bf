"""A queue with two slots, as on a machine with two GPUs: real jobs, which end before they train."""

import json
import logging
import os
import signal
import threading

import pytest

from entrypoint.queue.jobs import expand
from entrypoint.queue.record import QueueRecord
from entrypoint.queue.run import Queue, _was_its_own_limit
from tests.support.programs import basic_environment


@pytest.fixture
def queue(tmp_path, caplog):
    """`queue(**variables)`: a queue of two jobs at a time in `tmp_path`."""
    caplog.set_level(logging.INFO)

    def of(**variables):
        out = tmp_path / "output"
        environ = {**basic_environment(), "BASE_MODEL": "mini-flux", "OUTPUT_PATH": str(out)}
        environ |= {"CACHE_PATH": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"), **variables}
        jobs = expand(environ)
        slots = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
        return Queue(out, jobs, slots, QueueRecord.opened(out, jobs))

    return of


def said(caplog):
    return [record.message for record in caplog.records if record.message.startswith("----")]


def test_two_jobs_run_at_a_time_and_the_third_when_one_has_ended(queue, caplog, tmp_path):
    lines = [json.dumps({"DATASET_NAME": str(tmp_path / name)}) for name in ("a", "b", "c")]
    made = queue(JOBS="\n".join(lines) + "\n")
    assert made.run() in (65, 78)
    begun = [line.split()[2] if line.startswith("---- Job") else "end" for line in said(caplog)]
    assert begun[:3] == ["1", "2", "end"] and begun.index("3") > 2
    found = json.loads((tmp_path / "output" / "queue.json").read_text())["jobs"]
    assert {name: (one["state"], one["starts"]) for name, one in found.items()} == dict.fromkeys("abc", ("failed", 1))
    assert all("there is no folder" in one["message"] for one in found.values()) and all(
        one["seconds"] > 0 for one in found.values()
    )
    status = json.loads((tmp_path / "output" / "status.json").read_text())
    assert status["phase"] == "failed" and status["exit_code"] in (65, 78)


def test_a_stop_that_comes_while_a_job_is_made_ready_reaches_it(queue, tmp_path, monkeypatch):
    made = queue(JOBS=json.dumps({"DATASET_NAME": str(tmp_path / "none")}) + "\n")
    write = QueueRecord.write

    def stopped(record):
        monkeypatch.setattr(QueueRecord, "write", write)
        write(record)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(QueueRecord, "write", stopped)
    assert made.run() == 143
    (found,) = json.loads((tmp_path / "output" / "queue.json").read_text())["jobs"].values()
    assert (found["state"], found["exit_code"]) == ("stopped", 143), "it did not run to its end, 65"


def test_a_stop_reaches_all_jobs_that_run(queue, caplog, tmp_path):
    images = "trainer/families/miniatures/concept"
    made = queue(DATASET_NAME=os.path.abspath(images), SWEEP="PARAMS_SEED=1,2,3", PARAMS_MAX_STEPS="100000")
    timer = threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        assert made.run() == 143
    finally:
        timer.cancel()
    found = json.loads((tmp_path / "output" / "queue.json").read_text())["jobs"]
    assert [one["state"] for one in found.values()] == ["stopped", "stopped", "waiting"]
    assert [one["exit_code"] for one in found.values()] == [143, 143, None]


def test_a_stop_of_one_job_ends_the_queue(queue, caplog, tmp_path):
    images = "trainer/families/miniatures/concept"
    made = queue(DATASET_NAME=os.path.abspath(images), SWEEP="PARAMS_SEED=1,2,3", PARAMS_MAX_STEPS="100000")
    timer = threading.Timer(4.0, lambda: made.running[0].process.terminate())
    timer.start()
    try:
        assert made.run() == 143
    finally:
        timer.cancel()
    found = json.loads((tmp_path / "output" / "queue.json").read_text())["jobs"]
    assert [one["state"] for one in found.values()] == ["stopped", "stopped", "waiting"]
    assert "is one of the whole queue" in caplog.text


@pytest.mark.parametrize(
    ("line", "message", "goes_on"),
    [
        ({"MAX_RUNTIME": "1"}, "Stopped by SIGTERM.", True),
        ({"MAX_RUNTIME": "1"}, "Stopped on the monitor page at step 3.", False),
        ({}, "Stopped by SIGTERM.", False),
    ],
)
def test_a_limit_of_a_line_ends_that_job_alone(queue, line, message, goes_on):
    made = queue(JOBS="".join(f"{json.dumps({'PARAMS_SEED': seed, **line})}\n" for seed in (1, 2)), PRICE_PER_HOUR="1")
    assert _was_its_own_limit(made.jobs[0], message) is goes_on
