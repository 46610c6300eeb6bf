"""RunPod serverless worker: the input of a RunPod job is the variables of a Kiln job.

    {"input": {"BASE_MODEL": "flux", "DATASET_NAME": "org/images", "PARAMS_MAX_EPOCHS": 3}}

The worker runs Kiln, reports its progress, and answers with the names of the files. Files are too large to be an
answer, so give the endpoint a network volume, or name a repository of the Hub in PUSH_TO_HUB.

A request comes from a stranger. Kiln decides what it may say (entrypoint/runpod/allowed.py), and runs in a folder that
is made for it and deleted afterwards: nothing of one request is there for the next but the results, in a folder of
their own.

The package runpod needs other versions of some libraries than Kiln does. This file therefore runs in an environment of
its own, imports nothing of Kiln but a module of the standard library alone, and starts Kiln as a process with the
Python that KILN_PYTHON names. `python runpod/handler.py` beside a test_input.json runs one job on this machine.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

import runpod

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path.append(ROOT)  # at the end: the folder of this file has the name of RunPod's package

from trainer.spec.messages.secrets import without_secrets  # noqa: E402

KILN_PYTHON = os.environ.get("KILN_PYTHON", sys.executable)
WORKER = re.sub("[^A-Za-z0-9]", "", os.environ.get("RUNPOD_POD_ID", "")) or "local"
NETWORK_VOLUME = Path("/runpod-volume")  # where RunPod mounts it on serverless workers
POLL_INTERVAL_S = 2.0  # between two looks at the log and at status.json
END_S = 10.0  # for a job to save its state where the worker is stopped
REPORTED_FIELDS = ("phase", "step", "total_steps", "epoch", "loss", "images_per_second", "eta_s")  # of status.json
ERROR_LOG_LINES = 30  # the end of the log that is part of an error


def handler(job):
    """Run one job. Returns the last progress, "folder" and "loras" (file names), or {"error": text}."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,127}", str(job.get("id") or ""), re.ASCII):
        return {"error": "exit code 64\nThe id of the job is not one of RunPod's."}
    place = volume()
    place.mkdir(parents=True, exist_ok=True)
    output_path = place / job["id"]
    with tempfile.TemporaryDirectory(prefix=f"request-{WORKER}-", dir=place, ignore_cleanup_errors=True) as folder:
        asked = {"input": job.get("input"), "output": str(output_path), "folder": folder}
        exit_code, last_lines, reported = run(job, asked)
    if exit_code:
        return {"error": without_secrets(f"exit code {exit_code}\n{''.join(last_lines)}")}
    loras = sorted(path.name for path in output_path.glob("*.safetensors"))
    return {**(reported or {}), "folder": str(output_path), "loras": loras}


def volume():
    """The folder of all results and requests."""
    base = NETWORK_VOLUME if NETWORK_VOLUME.is_dir() else Path(os.environ.get("HOME", "/workspace"))
    return base / "kiln"


def tidy():
    """Delete what a request left here when this worker was killed. Other workers share the volume."""
    for folder in volume().glob(f"request-{WORKER}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def run(job, asked):
    """Run Kiln on what is asked, and report its progress; its exit code, the end of its log, the last progress."""
    process = subprocess.Popen(
        [KILN_PYTHON, "-m", "entrypoint.runpod.serverless"],
        env={**os.environ, "PYTHONPATH": ROOT}, cwd=asked["folder"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1,
    )  # fmt: skip
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # if it has ended, its log says why
            json.dump(asked, stdin)
        with stops_passed_on(process):
            return follow(job, process, Path(asked["output"]))
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def follow(job, process, output_path):
    """As `run`, of a process that has been started."""
    os.set_blocking(process.stdout.fileno(), False)  # readline returns "" when there is no line yet
    last_lines = deque(maxlen=ERROR_LOG_LINES)
    reported = None
    while True:
        # Asked before the log is read: after the process has ended, the log is read once more, to its end.
        exit_code = process.poll()
        for line in iter(process.stdout.readline, ""):
            print(line, end="", flush=True)
            last_lines.append(line)
        current = progress(output_path)
        if current and current != reported:
            runpod.serverless.progress_update(job, current)
            reported = current
        if exit_code is not None:
            return exit_code, last_lines, reported
        time.sleep(POLL_INTERVAL_S)


@contextlib.contextmanager
def stops_passed_on(process):
    """Inside, Kiln gets the signals that end this worker: it saves its state and ends, and then the worker does."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number, frame):
        process.send_signal(number)
        if callable(before[number]) and before[number] is not signal.default_int_handler:
            before[number](number, frame)  # RunPod's library takes no more jobs
        else:
            process.wait()
            sys.exit(128 + number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress(output_path):
    """The REPORTED_FIELDS of status.json; None while there is no such file, or half of one."""
    try:
        status = json.loads((output_path / "status.json").read_text(encoding="utf-8"))
        return {name: status[name] for name in REPORTED_FIELDS if name in status}
    except (OSError, ValueError, TypeError):
        return None


if __name__ == "__main__":
    tidy()
    runpod.serverless.start({"handler": handler})
