"""The receipt: how long a job took, what that cost, and where the time went."""

import json
import logging
import os

import pytest

from entrypoint.report.gather import gather
from entrypoint.report.receipt import receipt
from trainer.job.reporting.status import Status
from trainer.process import vitals


@pytest.fixture
def clocks(monkeypatch):
    """`clocks(seconds)` lets time pass."""
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_each_second_is_on_the_receipt_and_the_longest_come_first(tmp_path, clocks):
    clocks(30)  # a download
    status = Status(tmp_path)
    clocks(5)
    for phase, seconds in (("encoding", 20), ("training", 100), ("sampling", 40), ("training", 200), ("exporting", 5)):
        status.phase(phase)
        clocks(seconds)
    status.step = 300
    status.update({"first_step": 100})
    status.ended(None)
    clocks(80)  # an upload
    spent = json.loads((tmp_path / "status.json").read_text())["spent"]
    assert spent == {"starting": 5, "encoding": 20, "training": 300, "sampling": 40, "exporting": 5}
    assert receipt(tmp_path, started=1000.0, price=3600.0) == (
        "Receipt: 200 steps, 8 min in all, which cost 480.00 at 3600 an hour. Where the time went: training 5 min, "
        "uploads and the report 80 s, sampling 40 s, fetching and starting 30 s, encoding 20 s, starting 5 s."
    )
    assert "cost" not in receipt(tmp_path, started=1000.0, price=None)


def test_a_job_that_took_no_time_has_no_empty_list(tmp_path, clocks):
    Status(tmp_path).ended(None)
    assert receipt(tmp_path, started=1000.0, price=None) == "Receipt: 0 s in all."


def test_the_limit_the_report_and_the_receipt_count_from_one_start(tmp_path, clocks, monkeypatch):
    """That of the entrypoint: a download of half an hour comes before the trainer."""
    shared, path = vitals.Vitals.make()
    monkeypatch.setenv(vitals.VARIABLE, path)
    vitals.write_began(os.environ, 1000.0)
    clocks(1800)
    status = Status(tmp_path)
    clocks(1800)
    assert status.seconds() == 3600  # what the warning of a limit is given
    status.ended(None)
    shared.close()
    assert gather(tmp_path).start_seconds() == 3600
    assert receipt(tmp_path, started=1000.0, price=2.0).startswith("Receipt: 60 min in all, which cost 2.00")


def test_another_jobs_status_and_none_give_no_receipt(tmp_path, clocks):
    assert receipt(tmp_path, started=1000.0, price=1.0) is None
    Status(tmp_path).ended(None)
    assert receipt(tmp_path, started=1000.5, price=1.0) is None
    (tmp_path / "status.json").write_text("[]")
    assert receipt(tmp_path, started=0.0, price=1.0) is None


def test_a_job_ends_with_its_receipt(tmp_path, monkeypatch, caplog):
    from entrypoint import job as entrypoint

    def trained(settings, environ, nodes, **_):
        Status(settings.output.output_path).ended(None)
        return 0

    monkeypatch.setattr(entrypoint, "_job", trained)
    asked = {"BASE_MODEL": "mini-flux", "DATASET_NAME": str(tmp_path), "OUTPUT_PATH": str(tmp_path)}
    with caplog.at_level(logging.INFO):
        assert entrypoint.job(asked | {"CACHE_PATH": str(tmp_path)}, check=False) == 0
    assert caplog.messages[-1].startswith("Receipt: ")
    with caplog.at_level(logging.INFO):
        assert entrypoint.job(asked | {"CACHE_PATH": str(tmp_path), "RUNPOD_POD_ID": "p0d"}, check=False) == 0
    assert "python -m entrypoint.runpod fetch p0d" in caplog.messages[-1]
    assert f"runpodctl send {tmp_path}" in caplog.messages[-1]
    for more, words, level in (
        ({}, "Nothing was uploaded", "WARNING"),
        ({"PUSH_TO_HUB": "me/mine"}, "The results are in me/mine on the Hub", "INFO"),
    ):
        deleted = {"CACHE_PATH": str(tmp_path), "RUNPOD_POD_ID": "p0d", "ON_FINISH": "terminate", **more}
        with caplog.at_level(logging.INFO):
            assert entrypoint.job(asked | deleted, check=False) == 0
        assert "ON_FINISH=terminate deletes this pod now" in caplog.messages[-1] and words in caplog.messages[-1]
        assert caplog.records[-1].levelname == level and "fetch p0d" not in caplog.messages[-1]
