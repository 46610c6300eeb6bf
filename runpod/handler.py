"""RunPod serverless: a job's input is the variables of a Kiln job; its progress is told while it runs.

    {"input": {"BASE_MODEL": "flux", "DATASET_NAME": "org/pictures", "PARAMS_MAX_EPOCHS": 3}}

`python runpod/handler.py` beside a test_input.json runs one job here. The package runpod needs other versions of some
libraries than Kiln does: it has an environment of its own, and KILN_PYTHON names Kiln's. The answer names files, which
are too large to be an answer: give the endpoint a network volume.
"""

import difflib
import json
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import runpod

PYTHON = os.environ.get("KILN_PYTHON", sys.executable)
ROOT = str(Path(__file__).resolve().parent.parent)
VOLUME = Path("/runpod-volume")  # where a network volume is mounted on serverless workers
EVERY_S = 2.0  # between two looks at status.json
TOLD = ("phase", "step", "total_steps", "epoch", "loss", "images_per_second", "eta_s")
LINES = 30  # of the log, told with an error


def handler(job):
    """Train as `job["input"]` says; {"lora": path, ...}, or {"error": text}."""
    try:
        environment = job_environment(job["input"], job["id"])
    except ValueError as problem:
        return {"error": str(problem)}
    out = Path(environment["OUTPUT_PATH"])
    process = subprocess.Popen(
        [PYTHON, "-m", "entrypoint"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
    )  # fmt: skip
    os.set_blocking(process.stdout.fileno(), False)
    lines, told = deque(maxlen=LINES), None
    while True:
        code = process.poll()
        for line in iter(process.stdout.readline, ""):
            print(line, end="", flush=True)
            lines.append(line)
        now = progress(out)
        if now and now != told:
            runpod.serverless.progress_update(job, now)
            told = now
        if code is not None:
            break
        time.sleep(EVERY_S)
    if code:
        return {"error": f"exit code {code}\n{''.join(lines)}"}
    return {**(told or {}), "folder": str(out), "loras": sorted(p.name for p in out.glob("*.safetensors"))}


def job_environment(given, job_id):
    """The environment of a job. Raises ValueError: only the variables of Kiln may be set, nothing else."""
    if not isinstance(given, dict):
        raise ValueError("input is not an object of variables")
    known = variables()
    for name in given.keys() - set(known):
        near = difflib.get_close_matches(name, known, 1)
        raise ValueError(f"{name} is no variable.{f' Did you mean {near[0]}?' if near else ''}")
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    base = VOLUME if VOLUME.is_dir() else Path(os.environ.get("HOME", "/workspace"))
    # The worker stays: a job must not end it, as it would end a pod.
    worker = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    places = {"OUTPUT_PATH": f"{base}/kiln/{job_id}", "CACHE_PATH": f"{base}/kiln/cache", "HF_HOME": f"{base}/kiln/hf"}
    return {**worker, **places, **values, "ON_FINISH": "exit", "PYTHONPATH": ROOT}


def variables():
    """The names of all variables, as Kiln's own Python knows them."""
    code = "import json; from entrypoint.settings.variables import NAMES; print(json.dumps(NAMES))"
    environment = {**os.environ, "PYTHONPATH": ROOT}
    return json.loads(subprocess.run([PYTHON, "-c", code], env=environment, stdout=subprocess.PIPE, check=True).stdout)


def progress(out):
    """What status.json says, as far as it is of interest; None: nothing yet."""
    try:
        status = json.loads((out / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {name: status[name] for name in TOLD if name in status}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
