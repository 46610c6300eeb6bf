"""The serverless handler on its test_input.json: with RunPod's own library where it is, and with a stand-in for it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONCEPT = str(ROOT / "trainer/families/miniatures/concept")


def own_library():
    """Where RunPod's library is: in this environment, or in the folder of packages that KILN_RUNPOD_SITE names."""
    site = os.environ.get("KILN_RUNPOD_SITE", "")
    environment = {**os.environ, "PYTHONPATH": site}
    found = subprocess.run([sys.executable, "-c", "import runpod.serverless"], cwd="/", env=environment)
    return site if found.returncode == 0 else None


@pytest.fixture
def work(tmp_path):
    """`work(site, **input)`: run the handler on test_input.json; exit code, what was printed, progress."""

    def run(site, **job_input):
        job = json.loads((ROOT / "runpod/test_input.json").read_text())
        job["input"] |= {"DATASET_NAME": CONCEPT, **job_input}
        (tmp_path / "test_input.json").write_text(json.dumps(job))
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG")}
        progress_file = tmp_path / "progress"
        environment = {
            **kept, "HOME": str(tmp_path), "PYTHONPATH": site, "PROGRESS_FILE": str(progress_file),
            "OMP_NUM_THREADS": "1", "RUNPOD_POD_ID": "worker1", "RUNPOD_API_KEY": "never used", **SECRETS,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, ROOT / "runpod/handler.py"],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
        )  # fmt: skip
        progress = (
            [json.loads(line) for line in progress_file.read_text().splitlines()] if progress_file.exists() else []
        )
        return done.returncode, done.stdout, progress

    return run


CANARY = "cAnary-of-the-worker"
SECRETS = {"HF_TOKEN": f"hf_{CANARY}", "DB_PASS": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY, "HF_WRITE_TOKEN": CANARY}
STANDIN = str(ROOT / "tests/support/standin")


@pytest.mark.slow
def test_a_job_is_trained_and_reports_its_progress(work, tmp_path):
    code, printed, progress = work(STANDIN)
    assert code == 0, printed
    out = tmp_path / "kiln/local_test"
    assert (out / "lora.safetensors").is_file() and '"lora.safetensors"' in printed
    assert not (out / "pod.json").exists()  # a worker is no pod: it is not stopped
    assert [path.name for path in (tmp_path / "kiln").iterdir()] == ["local_test"]  # cache and home are gone
    assert CANARY not in printed
    assert [p for p in tmp_path.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()] == []
    phases = [step["phase"] for _, step in progress]
    assert phases[-1] == "done" and len(progress) >= 2 and progress[-1][1]["step"] == 3


@pytest.mark.slow
def test_with_runpods_own_library(work, tmp_path):
    site = own_library()
    if site is None:
        pytest.skip("RUNPOD'S LIBRARY WAS NOT TESTED: it is not here; KILN_RUNPOD_SITE may name where it is")
    code, printed, _ = work(site)
    assert code == 0 and "completed successfully" in printed, printed[-3000:]
    assert (tmp_path / "kiln/local_test/lora.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"LD_PRELOAD": "/x.so"}, "LD_PRELOAD is not a variable"),
        ({"PARAMS_MAX_STPES": 3}, "PARAMS_MAX_STEPS"),
        ({"PARAMS_NETWORK_DIM": "many"}, "PARAMS_NETWORK_DIM='many'"),
    ],
)
def test_the_answer_names_what_is_wrong(work, given, hint):
    code, printed, _ = work(STANDIN, **given)
    assert code == 1 and hint in printed


def test_what_a_request_may_not_name_is_refused_with_78_and_not_read(work, tmp_path):
    (tmp_path / "secret.txt").write_text(CANARY)
    inside = str(tmp_path / "secret.txt")
    prompts = {
        "SAMPLE_PROMPTS": "/proc/self/environ",
        "DATASET_CONFIG": {"datasets": [{"subsets": [{"image_dir": inside}]}]},
    }
    refused = {**prompts, "DATASET_NAME": inside, "OUTPUT_PATH": inside, "HF_TOKEN_FILE": inside, "ON_FINISH": "stop"}
    code, printed, progress = work(STANDIN, **refused, PUSH_TO_HUB="me/x")
    assert code == 1 and "exit code 78" in printed and CANARY not in printed and progress == []
    for name in (*refused, "PUSH_TO_HUB needs a token of the request"):
        assert f"- {name}" in printed
    assert list((tmp_path / "kiln").iterdir()) == []


def test_an_address_that_leads_inside_is_refused(work):
    code, printed, _ = work(STANDIN, DATASET_NAME="https://[::ffff:10.0.0.1]/x.zip")
    assert code == 1 and "exit code 78" in printed and "does not name a public host" in printed


@pytest.fixture
def handler(monkeypatch, tmp_path):
    """The module, with RunPod's library stood in for."""
    monkeypatch.syspath_prepend(STANDIN)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNPOD_POD_ID", "worker-1")
    spec = importlib.util.spec_from_file_location("kiln_handler", ROOT / "runpod/handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", ["../x", "a/b", "", "x" * 200, None])
def test_the_number_of_a_job_names_no_other_folder(handler, tmp_path, number):
    assert handler.handler({"id": number, "input": {}}).keys() == {"error"}
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_worker_left_of_a_request_is_deleted_when_it_starts_again(handler, tmp_path):
    for name in ("request-worker1-a/hf/hub", "request-worker2-b", "job-1"):
        (tmp_path / "kiln" / name).mkdir(parents=True)
    handler.tidy()
    assert {path.name for path in (tmp_path / "kiln").iterdir()} == {"request-worker2-b", "job-1"}


def test_objects_in_the_input_become_json(work):
    config = {"datasets": [{"resolution": 64, "subsets": [{"num_repeats": 0}]}]}
    code, printed, _ = work(STANDIN, DATASET_CONFIG=config)
    assert code == 1 and "num_repeats" in printed


def test_the_listing_says_what_its_page_asks_for():
    """https://docs.runpod.io/hub/publishing-guide"""
    hub, tests = (json.loads((ROOT / ".runpod" / name).read_text()) for name in ("hub.json", "tests.json"))
    assert {"title", "description", "type", "category", "config"} <= hub.keys()
    assert hub["type"] == "serverless" and hub["category"] in ("audio", "embedding", "language", "video", "image")
    config = hub["config"]
    assert config["runsOn"] == "GPU" and isinstance(config["containerDiskInGb"], int) and config["gpuCount"] == 1
    assert all({"key"} < entry.keys() for entry in config["env"])
    assert all(isinstance(test["name"], str) and isinstance(test["input"], dict) for test in tests["tests"])
    from entrypoint.settings.variables import NAMES

    assert {name for test in tests["tests"] for name in test["input"]} <= set(NAMES)
    for name in ("handler.py", "Dockerfile"):
        assert (ROOT / ".runpod" / name).is_file()


def test_a_worker_that_is_ended_ends_its_job_first(tmp_path):
    """With 143, as RunPod's own library does not mind: the stand-in has no handler."""
    job = json.loads((ROOT / "runpod/test_input.json").read_text())
    job["input"] |= {"DATASET_NAME": CONCEPT, "PARAMS_MAX_STEPS": "4000"}
    (tmp_path / "test_input.json").write_text(json.dumps(job))
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG")}
    environment = {**kept, "HOME": str(tmp_path), "PYTHONPATH": STANDIN, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        worker = subprocess.Popen(
            [sys.executable, ROOT / "runpod/handler.py"], cwd=tmp_path, env=environment, stdout=file, stderr=file
        )
        deadline = time.monotonic() + 100
        while "A LoRA of" not in log.read_text():  # the job has begun
            assert time.monotonic() < deadline and worker.poll() is None, log.read_text()
            time.sleep(0.05)
        worker.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        assert worker.wait(timeout=20) == 143 and time.monotonic() - sent < 6, log.read_text()
    status = json.loads((tmp_path / "kiln/local_test/status.json").read_text())
    assert (status["phase"], status["exit_code"]) == ("stopped", 143) and "Traceback" not in log.read_text()
