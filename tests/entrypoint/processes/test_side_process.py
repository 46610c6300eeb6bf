"""A process beside a job: what it is told, how long it is waited for, and that nothing of it reaches the job."""

import json
import os
import subprocess
import sys
import time

import pytest

from entrypoint.processes import side_process
from entrypoint.processes.side_process import SideProcess
from entrypoint.system.environment import child_environment
from trainer.spec.errors import UnreachableError

WRITES = """
import json, os, sys
from entrypoint.processes.side_process import Instructions, leave_stops_to_the_job
leave_stops_to_the_job()
told = Instructions()
print("noise")
was_told = told.ended.wait(60)
with open(told.first["file"], "w") as file:
    json.dump([told.first["address"], was_told, told.exit_code, told.message, told.seconds], file)
"""
WAITS = "import time; time.sleep(60)"
FAILS = "import sys; sys.exit(1)"
IS_KILLED = "import os; os.kill(os.getpid(), 9)"


@pytest.fixture
def beside(tmp_path):
    """`beside(code)`: the context of a job beside which this code runs."""

    def made(code, most_s=30.0, **more):
        (tmp_path / "told_lines.py").write_text(code)
        environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")} | more
        own = child_environment({**environment, "PYTHONPATH": str(tmp_path)})
        side = SideProcess("told_lines", "LOG_WITH=x", most_s)
        first = {"file": str(tmp_path / "told.json"), "address": "https://a/b"}
        return side_process.running(side, first, own=own, environment=environment)

    made.told = lambda: json.loads((tmp_path / "told.json").read_text())
    return made


def test_it_is_told_what_to_do_and_how_the_job_has_ended(beside, capfd, caplog):
    with beside(WRITES) as ending:
        ending.exit_code, ending.message = 0, ""
    assert beside.told() == ["https://a/b", True, 0, "", 30.0]
    assert capfd.readouterr().out == "" and caplog.text == ""


def test_an_error_of_the_job_is_told_without_secrets_and_raised(beside):
    with pytest.raises(UnreachableError):
        with beside(WRITES, HF_TOKEN="hf_cAnaryTOKEN"):
            raise UnreachableError("No answer for hf_cAnaryTOKEN.")
    assert beside.told() == ["https://a/b", True, 75, "No answer for ***.", 30.0]
    with pytest.raises(ZeroDivisionError):
        with beside(WRITES):
            raise ZeroDivisionError
    assert beside.told()[2:4] == [70, "An unexpected error: see run.log."]


@pytest.mark.parametrize("exit_code", [130, 143])
def test_after_a_stop_there_are_seconds_and_the_parent_is_asked_for_them(beside, monkeypatch, exit_code):
    asked = []
    monkeypatch.setattr(side_process.vitals, "prolong", lambda environment, seconds: asked.append(seconds))
    with beside(WRITES) as ending:
        ending.exit_code = exit_code
    assert beside.told()[4] == 1.5 and asked == [2.0]


def test_one_that_does_not_end_is_ended(beside, monkeypatch, caplog):
    monkeypatch.setattr(side_process, "GRACE_S", 0.1)
    began = time.monotonic()
    with beside(WAITS, most_s=0.2):
        pass
    assert 0.3 <= time.monotonic() - began < 10
    assert caplog.messages == [
        "LOG_WITH=x: not everything was sent in 0.3 s. The next start in this folder sends the rest."
    ]


@pytest.mark.parametrize(("code", "lines"), [(FAILS, 0), (IS_KILLED, 1)])
def test_one_that_has_ended_is_told_of_unless_it_has_said_why(beside, monkeypatch, caplog, code, lines):
    started, found = side_process._started, []
    monkeypatch.setattr(side_process, "_started", lambda *given: found.append(started(*given)) or found[0])
    with beside(code):
        found[0].wait(60)
    assert caplog.messages == ["LOG_WITH=x: its process has ended. The job goes on."][:lines]


def test_where_none_can_be_started_the_job_goes_on(beside, monkeypatch, caplog):
    def fails(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(side_process.subprocess, "Popen", fails)
    with beside(WRITES) as ending:
        ending.exit_code = 0
    said = "LOG_WITH=x: no process could be started (Resource temporarily unavailable). The job goes on."
    assert caplog.messages == [said]


def test_it_ends_with_a_job_that_is_gone_without_a_word(tmp_path):
    (tmp_path / "told_lines.py").write_text(WRITES)
    own = child_environment({**os.environ, "PYTHONPATH": str(tmp_path)})
    first = json.dumps({"file": str(tmp_path / "told.json"), "address": ""})
    done = subprocess.run(
        [sys.executable, "-m", "told_lines"], env=own, input=f"{first}\n", text=True, capture_output=True, check=False
    )
    assert done.returncode == 143 and not (tmp_path / "told.json").exists()
