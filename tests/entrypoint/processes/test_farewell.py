"""What is said of a job that could not say itself how it ended."""

import fcntl
import json
import signal
import sys

import pytest

from entrypoint.processes import farewell
from trainer.process.guard import Ending

STARTED = 1000.0
STOPPED = Ending(143, STARTED, signal.SIGTERM, killed=True)


@pytest.fixture
def said(tmp_path, monkeypatch, capfd):
    """`said(ending, status)`: what is printed, and status.json afterwards."""
    monkeypatch.setenv("OUTPUT_PATH", str(tmp_path / "output"))
    monkeypatch.setattr(sys, "argv", ["entrypoint"])

    def say(ending, status=None):
        path = tmp_path / "output" / "status.json"
        if status is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(status))
        farewell.say(ending)
        return capfd.readouterr().err, json.loads(path.read_text()) if path.exists() else None

    return say


def test_before_training(said):
    printed, status = said(STOPPED)
    assert printed.endswith(
        "Stopped by SIGTERM before training began. Start the same command again to go on: it resumes automatically. "
        "[exit 143]\n"
    )
    assert (status["phase"], status["exit_code"], status["started"]) == ("stopped", 143, STARTED)


def test_what_an_earlier_start_has_reached_stays(said):
    _, status = said(
        STOPPED, {"started": 1.0, "job_started": 0.5, "phase": "done", "exit_code": 0, "run": "x", "step": 40}
    )
    assert (status["phase"], status["run"], status["step"], status["exit_code"]) == ("stopped", "x", 40, 143)
    assert "before training began" in status["message"] and status["job_started"] == STARTED


def test_a_trainer_that_did_not_answer(said):
    printed, status = said(STOPPED, {"started": 1001.0, "phase": "sampling", "step": 9, "saved_step": 8})
    assert "in the phase 'sampling'; the newest state is that of step 8." in printed
    assert (status["phase"], status["step"], status["saved_step"]) == ("stopped", 9, 8)


def test_after_training(said):
    printed, status = said(STOPPED, {"started": 1001.0, "phase": "done", "exit_code": 0, "output": "x.safetensors"})
    assert "after training: the LoRA is complete" in printed and status["exit_code"] == 143


def test_who_has_said_it_is_not_contradicted(said):
    own = {"started": 1001.0, "phase": "stopped", "exit_code": 143, "message": "Stopped at step 7; it is saved."}
    assert said(Ending(143, STARTED, signal.SIGTERM), own) == ("", own)
    assert said(STOPPED, own) == ("", own)


def test_a_trainer_that_had_no_handler_yet(said):
    """It ends by the signal, and the entrypoint with the right code; nobody has said a word."""
    printed, status = said(Ending(143, STARTED, signal.SIGTERM))
    assert "Stopped by SIGTERM before training began." in printed and status["exit_code"] == 143


def test_of_machines_that_train_together_the_first_alone_writes_the_status(said, monkeypatch):
    """Another one does not know how far training has come, and may see the same volume."""
    monkeypatch.setenv("NODES", "auto")
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "1")
    status = {"started": 1001.0, "phase": "training", "step": 9}
    assert said(STOPPED, status) == ("Stopped by SIGTERM. [exit 143]\n", status)
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "0")
    assert said(STOPPED, status)[1]["phase"] == "stopped"


@pytest.mark.parametrize("code", [0, 74])
def test_who_ended_otherwise_has_said_so(said, code):
    printed, _ = said(Ending(code, STARTED, signal.SIGTERM))
    assert printed == ""


def test_killed_for_memory(said):
    printed, status = said(Ending(75, STARTED, cause="The program was killed for memory."))
    assert "ERROR The program was killed for memory." in printed and "[exit 75]" in printed
    assert (status["phase"], status["exit_code"]) == ("failed", 75)


def test_the_status_of_another_job_is_left_alone(said, tmp_path):
    other = {"started": 5.0, "phase": "training"}
    (tmp_path / "output").mkdir()
    with (tmp_path / "output" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        printed, status = said(STOPPED, other)
    assert status == other and "before training began" in printed


@pytest.mark.parametrize("arguments", [["check"], ["--check"], ["--gpu", "RTX 4090"], ["sample", "--base", "flux"]])
def test_other_commands_write_nothing(said, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["entrypoint", *arguments])
    assert said(STOPPED) == ("Stopped by SIGTERM. [exit 143]\n", None)


@pytest.mark.parametrize("arguments", [["monitor", "output"], ["quote"], ["quote", "--json"], ["shell"], ["trian"]])
def test_the_status_of_a_finished_job_stays(said, monkeypatch, arguments):
    """Ctrl-C ends the monitor page, long after the job whose folder it shows."""
    monkeypatch.setattr(sys, "argv", ["entrypoint", *arguments])
    done = {"started": 1.0, "phase": "done", "exit_code": 0, "run": "x", "step": 40}
    assert said(Ending(130, STARTED, signal.SIGINT, killed=True), done) == ("Stopped by Ctrl-C. [exit 130]\n", done)


@pytest.mark.parametrize("arguments", [["train"], ["-v"], ["train", "--verbose"]])
def test_train_is_a_job_with_and_without_its_name(said, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["entrypoint", *arguments])
    assert said(STOPPED)[1]["exit_code"] == 143


def test_the_folder_may_stand_in_one_variable_with_all_others(tmp_path):
    given = {"CONFIG_JSON": json.dumps({"OUTPUT_PATH": str(tmp_path)})}
    assert farewell.output_path(given) == tmp_path
    for odd in ("[", "[]", '{"OUTPUT_PATH": 3}', "[" * 100_000):
        assert str(farewell.output_path({"CONFIG_JSON": odd})) == "/workspace/output"
