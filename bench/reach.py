"""Measures the rows of "Targets and results" in docs/performance.md that need one accelerator, on all there are.

    python -m bench reach FOLDER [--seconds 600] [--only NAME …]

Each measurement is a process of its own. When it ends, a line is printed with its name, its exit code and the lines of
JSON that it printed; its whole output is in FOLDER/NAME.log. A measurement that takes longer than `--seconds` is
killed. Models are written into FOLDER: all rows take 120 GB of disk.
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
# {} stands for a folder of the row's own. The longest come first, so that all accelerators end at about the same time.
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
    """Run a row on one accelerator (None: the CPU); its exit code and the lines of JSON that it printed."""
    row_folder = folder / name
    command = [sys.executable, "-m", "bench", *(part.format(row_folder) for part in ROWS[name])]
    environment = dict(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    started = time.monotonic()
    log = folder / f"{name}.log"
    with log.open("wb") as file:  # unbuffered by us: complete whenever the row is killed
        row = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            code = row.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = 124  # as timeout(1)
            os.killpg(row.pid, signal.SIGKILL)  # with a job's own processes, which would slow down the next row
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

    def run_on_free_device(name: str) -> None:
        device = devices.get()
        try:
            print(json.dumps(measured(name, asked.folder, asked.seconds, device)), flush=True)
        finally:
            devices.put(device)

    with ThreadPoolExecutor(devices.qsize()) as pool:
        list(pool.map(run_on_free_device, asked.only))
