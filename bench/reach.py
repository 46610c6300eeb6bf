"""All that docs/performance.md's table "What is to be reached" asks of one accelerator, spread over those there are.

    python -m bench reach FOLDER [--seconds 600] [--only NAME …]

Each row is a measurement of its own process, told as it ends: its name, how it ended, and the JSON lines that it
printed; all that it said is in FOLDER/NAME.log. What takes longer than `--seconds` is ended. Models are written into
FOLDER: 120 GB of disk for all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

JOB = ("PARAMS_BATCH_SIZE=1", "PARAMS_NETWORK_DIM=16", "PARAMS_NETWORK_ALPHA=16", "PARAMS_LEARNING_RATE=1e-4")
CAPPED = (
    *JOB,
    "PARAMS_OPTIMIZER_TYPE=adamw8bit",
    "PARAMS_MAX_STEPS=8",
    "PARAMS_RESOLUTION=1024",
    "PARAMS_SAMPLE_EVERY_N_STEPS=8",
)
PERSON = (
    *JOB,
    "PARAMS_OPTIMIZER_TYPE=adamw",
    "PARAMS_MAX_STEPS=1000",
    "PARAMS_RESOLUTION=512",
    "PARAMS_SAMPLE_EVERY_N_STEPS=0",
)
# {} stands for a folder of the row's own. The dearest come first, so that none is alone at the end.
ROWS: dict[str, tuple[str, ...]] = {
    "job-person": ("job", "{}", "--family", "flux", "--again", *PERSON),
    "job-flux-8": ("job", "{}", "--family", "flux", "MEMORY_LIMIT_GIB=8", *CAPPED),
    "job-sd3-8": ("job", "{}", "--family", "sd3", "MEMORY_LIMIT_GIB=8", *CAPPED),
    "job-sdxl-5": ("job", "{}", "--family", "sdxl", "MEMORY_LIMIT_GIB=5", *CAPPED),
    "step-sdxl": (
        "step",
        "--family",
        "sdxl",
        "fp8+none+replay+eager:1",
        "fp8+none+replay+eager:4",
        "bf16+none+plain+replay+eager+native:4",
    ),
    "step-flux": (
        "step",
        "--family",
        "flux",
        "fp8+none+replay+eager:1",
        "fp8+products+replay:4",
    ),
    "step-flux-16": ("step", "--family", "flux", "--limit", "16", "fp8+attention+host+replay:1"),
    "step-flux-20": (
        "step",
        "--family",
        "flux",
        "--limit",
        "20",
        "fp8+attention+host:4",
        "fp8+attention+host+replay:4",
    ),
    "step-flux-72": ("step", "--family", "flux", "--limit", "72", "fp8+products+replay+eager:4"),
    "step-sd3": ("step", "--family", "sd3", "fp8+none+turned+replay:4", "bf16+none+plain+native:4"),
    "huge": (
        "step",
        "--family",
        "flux",
        "--times",
        "1",
        *(f"fp8+all+host:{batch}" for batch in (8, 16, 32, 48, 60, 96)),
    ),
    "peers-sd3": ("peers", "--family", "sd3", "--batch", "4", "--ours", "fp8+none+replay"),
    "peers-sdxl": ("peers", "--family", "sdxl", "--batch", "4", "--ours", "fp8+none+replay+eager"),
    "parity-flux": ("parity", "--family", "flux", "--precision", "fp8+plain", "fp8"),
    "memory-flux": ("memory", "--family", "flux", "--batch", "1", "4"),
    "kernels": ("kernels",),
}


def measured(name: str, folder: Path, seconds: float, device: int | None) -> dict[str, object]:
    """Run a row on one accelerator; its last JSON lines."""
    own = folder / name
    command = [sys.executable, "-m", "bench", *(part.format(own) for part in ROWS[name])]
    seen = {} if device is None else {"CUDA_VISIBLE_DEVICES": str(device)}
    started, log = time.monotonic(), folder / f"{name}.log"
    with log.open("wb") as file:  # what it says is there at once, whatever ends this
        row = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **seen}, start_new_session=True)
        try:
            code = row.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = 124
            os.killpg(row.pid, signal.SIGKILL)  # a job's own processes as well: they would slow down what comes next
            row.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]
    return {
        "row": name,
        "exit": code,
        "took_s": round(time.monotonic() - started),
        "said": list(map(json.loads, lines)),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    devices: queue.Queue[int | None] = queue.Queue()
    for device in range(torch.cuda.device_count()) if torch.cuda.is_available() else (None,):
        devices.put(device)

    def one(name: str) -> None:
        device = devices.get()
        try:
            print(json.dumps(measured(name, asked.folder, asked.seconds, device)), flush=True)
        finally:
            devices.put(device)

    with ThreadPoolExecutor(devices.qsize()) as pool:
        list(pool.map(one, asked.only))
