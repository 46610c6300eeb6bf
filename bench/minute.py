"""The one-minute LoRA: a person's whole job on several GPUs, from the start of the process, and where each second goes.

    python -m bench minute FOLDER --family flux --gpus 1 2 [NAME=VALUE …]

20 images of ten shapes around 1024 x 1024, 1,000 images' worth of steps of one image on each GPU, samples of the four
prompts of `prompts.txt` before the first step and at the end. Each number of GPUs has two jobs: with empty caches (no
encoded images, no compiled kernels), and a second one with warm caches. The model, with random weights, and the images
are written into FOLDER once, which takes an accelerator and 35 GB of disk for Flux.1; NAME=VALUE: further settings.

`lora_s`: until the final LoRA had its name. `seconds`: until the job had ended, with the last samples and the report.
`spent`: the seconds of each phase, of which "before" are those until the trainer began, and "after" those after it.
`rounds_s`: of each round of samples, of which the first process draws its share. `rehearsal_s` is part of "loading the
model". `step_s`: the median step. With `--small`, the miniature on the CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from bench import job
from bench.report import Report, options
from bench.step import base_of

SHAPES = 10
SETTINGS = {
    "PARAMS_BATCH_SIZE": "1",
    "PARAMS_NETWORK_DIM": "16",
    "PARAMS_NETWORK_ALPHA": "16",
    "PARAMS_LEARNING_RATE": "1e-4",
    "PARAMS_OPTIMIZER_TYPE": "adamw",
    "PARAMS_RESOLUTION": "1024",
    "PARAMS_SAVE_EVERY_N_STEPS": "0",
    "MONITOR_PORT": "0",
}
SMALL = {"MODEL_PATH": "", "BACKEND": "cpu", "PARAMS_RESOLUTION": "128"}
DREW = re.compile(r"Drew .* samples of step \d+ in ([0-9.]+) s")
REHEARSED = re.compile(r"; tried in ([0-9.]+) s")


def settings_of(asked: argparse.Namespace, size: int) -> dict[str, str]:
    """The variables of the job on `size` GPUs."""
    steps = max(1, asked.worth // size)
    found = {**SETTINGS, "NUM_GPUS": str(size), "PARAMS_MAX_STEPS": str(steps)}
    found["PARAMS_SAMPLE_EVERY_N_STEPS"] = str(steps)
    # An epoch is the whole job, so that no step of it lacks an image for a GPU.
    found["PARAMS_NUM_REPEATS"] = str(max(1, asked.worth // job.IMAGES))
    if asked.small:
        found |= SMALL
    return found | dict(setting.split("=", 1) for setting in asked.settings)


def measure(folder: Path, name: str, settings: dict[str, str]) -> dict[str, Any]:
    """Run one job; its row."""
    row = job.run(folder, name, settings, 0)
    del row["job"]
    out = Path(row.pop("out"))
    log = (out / "run.log").read_text()
    row["rounds_s"] = [float(seconds) for seconds in DREW.findall(log)]
    row["rehearsal_s"] = next((float(seconds) for seconds in REHEARSED.findall(log)), None)
    status = json.loads((out / "status.json").read_text())
    started = row.pop("started")
    row["spent"] = {
        "before": round(status["started"] - started, 1),
        **status["spent"],
        "after": round(started + row["seconds"] - status["updated"], 1),
    }
    final = out / status.get("output", "-")
    if final.is_file():
        row["lora_s"] = round(final.stat().st_mtime - started, 1)
    return row


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--worth", type=int, default=1000, help="images that are trained on, in all")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    asked = parser.parse_intermixed_args(arguments)
    if not (asked.folder / "pictures").is_dir():
        job.write_images(asked.folder / "pictures", SHAPES)
    if not asked.small and not (asked.folder / "model").is_dir():
        job.write_model(asked.folder / "model", asked.family)
    report = Report(f"{asked.family}: a whole job of {asked.worth} images' worth of steps", asked.markdown)
    for size in asked.gpus:
        shutil.rmtree(asked.folder / "cache", ignore_errors=True)
        for caches in ("empty", "warm"):
            name = base_of(asked.family, small=asked.small)
            row = measure(asked.folder, name, settings_of(asked, size))
            report.row({"gpus": size, "caches": caches, **row})
