"""RunPod serverless worker: the input of a RunPod job is the variables of a Kiln job.

    {"input": {"BASE_MODEL": "flux", "DATASET_NAME": "org/images", "PARAMS_MAX_EPOCHS": 3}}

The worker runs Kiln, reports its progress, and answers with the names of the files. Files are too large to be an
answer, so give the endpoint a network volume.

The package runpod needs other versions of some libraries than Kiln does. This file therefore runs in an environment of
its own, imports nothing of Kiln, and starts it as a process with the Python that KILN_PYTHON names.
`python runpod/handler.py` beside a test_input.json runs one job on this machine.
"""

import contextlib
import difflib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import runpod

KILN_PYTHON = os.environ.get("KILN_PYTHON", sys.executable)
ROOT = str(Path(__file__).resolve().parent.parent)
NETWORK_VOLUME = Path("/runpod-volume")  # where RunPod mounts it on serverless workers
POLL_INTERVAL_S = 2.0  # between two looks at the log and at status.json
REPORTED_FIELDS = ("phase", "step", "total_steps", "epoch", "loss", "images_per_second", "eta_s")  # of status.json
ERROR_LOG_LINES = 30  # the end of the log that is part of an error


def handler(job):
    """Run one job. Returns the last progress, "folder" and "loras" (file names), or {"error": text}."""
    try:
        environment = job_environment(job["input"], job["id"])
    except ValueError as problem:
        return {"error": str(problem)}
    output_path = Path(environment["OUTPUT_PATH"])
    process = subprocess.Popen(
        [KILN_PYTHON, "-m", "entrypoint"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
    )  # fmt: skip
    os.set_blocking(process.stdout.fileno(), False)  # readline returns "" when there is no line yet
    last_lines = deque(maxlen=ERROR_LOG_LINES)
    reported = None
    with stops_passed_on(process):
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
                break
            time.sleep(POLL_INTERVAL_S)
    if exit_code:
        return {"error": f"exit code {exit_code}\n{''.join(last_lines)}"}
    loras = sorted(path.name for path in output_path.glob("*.safetensors"))
    return {**(reported or {}), "folder": str(output_path), "loras": loras}


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


def job_environment(job_input, job_id):
    """The environment of Kiln's process. Raises ValueError for anything in the input but variables of Kiln."""
    if not isinstance(job_input, dict):
        raise ValueError('The input must be an object of variables: {"BASE_MODEL": "flux", ...}.')
    known = variables()
    for name in job_input.keys() - set(known):
        similar = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {similar[0]}?" if similar else ""
        raise ValueError(f"{name} is not a variable of Kiln.{hint}")
    values = {}
    for name, value in job_input.items():
        values[name] = value if isinstance(value, str) else json.dumps(value)
    base = NETWORK_VOLUME if NETWORK_VOLUME.is_dir() else Path(os.environ.get("HOME", "/workspace"))
    paths = {"OUTPUT_PATH": f"{base}/kiln/{job_id}", "CACHE_PATH": f"{base}/kiln/cache", "HF_HOME": f"{base}/kiln/hf"}
    # Without RUNPOD_POD_ID and the key, Kiln does not take the worker for a pod, which it would stop after the job.
    worker = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    return {**worker, **paths, **values, "ON_FINISH": "exit", "PYTHONPATH": ROOT}


def variables():
    """The names of all variables, as Kiln's own Python knows them."""
    code = "import json; from entrypoint.settings.variables import NAMES; print(json.dumps(NAMES))"
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([KILN_PYTHON, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def progress(output_path):
    """The REPORTED_FIELDS of status.json; None while there is no such file, or half of one."""
    try:
        status = json.loads((output_path / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {name: status[name] for name in REPORTED_FIELDS if name in status}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
