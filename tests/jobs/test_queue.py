"""Queues of real jobs: one after another, with one that fails, stopped in the middle, and resumed."""

import json
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image


@pytest.fixture
def queue(job, tmp_path):
    """The variables of a queue: two jobs and one between them whose images are missing."""
    (tmp_path / "empty").mkdir()
    lines = [
        {"OUTPUT_NAME": "first", "PARAMS_MAX_STEPS": 40, "PARAMS_SAVE_EVERY_N_STEPS": 2},
        {"OUTPUT_NAME": "broken", "DATASET_NAME": str(tmp_path / "empty")},
        {"OUTPUT_NAME": "last", "PARAMS_MAX_STEPS": 2},
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    prompts = '["a spot --w 64 --h 64 --s 1"]'
    return {"JOBS": str(tmp_path / "jobs.jsonl"), "SAMPLE_PROMPTS": prompts, "PARAMS_SAMPLE_EVERY_N_STEPS": "40"}


def entries(job):
    return json.loads((job.out / "queue.json").read_text())["jobs"]


def steps(folder):
    path = folder / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return [json.loads(row)["step"] for row in rows if row.endswith("}") and '"loss"' in row]


def start(job, queue, **changes):
    job.environment.pop("OUTPUT_NAME", None)
    return job.start(**queue, **changes)


def test_a_queue_whose_jobs_all_fail_runs_all_and_says_which(job, tmp_path):
    lines = [{"DATASET_NAME": str(tmp_path / f"none-{i}")} for i in range(2)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    process = start(job, {"JOBS": text})
    printed, _ = process.communicate(timeout=240)
    assert process.returncode in (65, 78), printed
    assert [entry["state"] for entry in entries(job).values()] == ["failed", "failed"]
    table = (job.out / "queue.md").read_text()
    assert "none-0" in table and "none-1" in table and "0 of 2 jobs are done" in printed


def test_an_unknown_variable_ends_the_queue_before_any_job(job):
    process = start(job, {"JOBS": '{"PARAMS_SEED": 1}\n{"PARAMS_SEEED": 2}\n'})
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 78 and "JOBS, line 2" in printed and "did you mean PARAMS_SEED" in printed
    assert not (job.out / "queue.json").exists()


def test_a_stopped_queue_leaves_its_table_and_no_temporary_folder(job, tmp_path):
    (tmp_path / "tmp").mkdir()
    job.environment.pop("OUTPUT_NAME", None)
    seeds = ",".join(map(str, range(100)))  # many, so that the table takes its time
    own = {**job.environment, "SWEEP": f"PARAMS_SEED={seeds}", "TMPDIR": str(tmp_path / "tmp")}
    words = [sys.executable, "-m", "entrypoint"]  # a program of its own, which looks for its temporary folder anew
    process = subprocess.Popen(words, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (job.out / "queue.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    assert list((tmp_path / "tmp").glob("kiln-queue-*"))
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() < asked + 8, printed
    assert "0 of 100 jobs are done" in printed and "| seed-99 |" in (job.out / "queue.md").read_text()
    status = json.loads((job.out / "status.json").read_text())
    assert (status["phase"], status["exit_code"], status["run"]) == ("stopped", 143, "queue")
    assert not list((tmp_path / "tmp").glob("kiln-queue-*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_queue_is_stopped_and_goes_on_where_it_was(job, queue):
    process = start(job, queue)
    deadline = time.monotonic() + 240
    while len(steps(job.out / "first")) < 6:
        assert process.poll() is None and time.monotonic() < deadline, process.printed()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    found = entries(job)
    assert [found[name]["state"] for name in ("first", "broken", "last")] == ["stopped", "waiting", "waiting"]
    assert found["first"]["exit_code"] == 143

    printed, _ = (process := start(job, queue)).communicate(timeout=600)
    assert process.returncode in (65, 78), printed
    assert "Resumed at step" in printed and steps(job.out / "first")[-1] == 40
    found = entries(job)
    assert [found[name]["state"] for name in ("first", "broken", "last")] == ["done", "failed", "done"]
    assert found["first"]["starts"] == 2 and (job.out / "last" / "last.safetensors").is_file()
    table = (job.out / "queue.md").read_text()
    assert "| first | 40 |" in table and "| broken |" in table
    with Image.open(job.out / "contact-sheet.png") as sheet:
        assert sheet.width > 3 * 256 and json.loads(sheet.info["prompts"]) == ["a spot"]

    printed, _ = (process := start(job, queue)).communicate(timeout=240)
    assert "1 to do" in printed, "what is done is not begun again"
    assert {name: entry["starts"] for name, entry in entries(job).items()} == {"first": 2, "broken": 2, "last": 1}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_limit_of_money_is_that_of_the_whole_queue(job):
    limit = {"PRICE_PER_HOUR": "3600", "MAX_COST": "45", "PARAMS_MAX_STEPS": "100000"}  # 45 s
    process = start(job, {"SWEEP": "PARAMS_SEED=1,2"}, **limit)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 143 and "MAX_COST is reached" in printed, printed
    states = [entry["state"] for entry in entries(job).values()]
    assert states == ["stopped", "waiting"]
