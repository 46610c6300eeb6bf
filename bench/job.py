"""Whole jobs on a full-size model with random weights and on random images.

    python -m bench job FOLDER --family flux --shapes 20                # writes the model, and images of 20 shapes
    python -m bench job FOLDER --family flux NAME=VALUE …               # and runs a job with these settings
    python -m bench job FOLDER --family flux --again NAME=VALUE …       # and a second one, with warm caches

Needs an accelerator to make the weights on, and 35 GB of disk for Flux.1. Prints for each job: seconds from the start
of the process to the first step and to the end, the median step, and the peak of reserved device memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.shapes import shapes as bucket_shapes
from bench.step import base_of, free, random_weights
from trainer.spec.family import get_family

IMAGES = 20
SIDE = 768  # pixels
MAX_TOKENS = {"CLIP": 77, "T5": 512}  # by the start of the tokenizer's class


def write_folder(folder: Path, name: str) -> dict[str, Any]:
    """A model folder without weights, with the tokenizers' usual lengths; returns its parts on the device "meta"."""
    from bench import full_size  # imports diffusers' models

    models = full_size.write_configs(folder, name, full_size.FULL[name])
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(path.read_text())
        for start, count in MAX_TOKENS.items():
            if config["tokenizer_class"].startswith(start):
                path.write_text(json.dumps({**config, "model_max_length": count}))
    return models


def write_model(folder: Path, name: str) -> None:
    """A model folder with random weights, made on the accelerator part by part."""
    models = write_folder(folder, name)
    for part, skeleton in models.items():
        started = time.monotonic()
        subfolder = get_family(name).FACTS.parts[part]
        model_class: Any = type(skeleton)
        config = skeleton.config
        build = getattr(model_class, "from_config", model_class)  # diffusers' models have it, transformers' do not
        with random_weights("cuda"):
            model = build(config)
        model.save_pretrained(folder / subfolder)
        del model
        free()
        print(f"{subfolder} {time.monotonic() - started:.1f} s", flush=True)


def write_images(folder: Path, shapes: int) -> None:
    """Twenty images: of one square shape, or of so many of the default dataset.json's buckets in turn."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = bucket_shapes(shapes) if shapes > 1 else [(SIDE, SIDE)]
    for i in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
        coarse.resize(sizes[i % len(sizes)]).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a picture of zot, number {i}")


def run(folder: Path, name: str, settings: dict[str, str], number: int) -> dict[str, Any]:
    """Run one job on the BASE_MODEL `name`; returns the row to print."""
    out = Path(settings.get("OUTPUT_PATH", folder / f"out-{time.time_ns()}"))
    variables = {
        "BASE_MODEL": name,
        "MODEL_PATH": str(folder / "model"),
        "DATASET_NAME": str(folder / "pictures"),
        "OUTPUT_PATH": str(out),
        "CACHE_PATH": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "cache" / "triton"),
        **settings,
    }
    environment = {**os.environ, **variables}
    started = time.time()
    code = subprocess.run([sys.executable, "-m", "entrypoint"], env=environment, check=False).returncode
    row: dict[str, Any] = {"job": number, "exit": code, "seconds": round(time.time() - started, 1)}
    row |= {"started": started, "out": str(out)}
    if code == 0:
        row |= _step_times(out / "metrics.jsonl", started)
    row["reserved_gib"] = _reserved_gib(out / "run.log")
    return row


def _step_times(metrics: Path, started: float) -> dict[str, Any]:
    """Seconds to the first step, of the median step, and of training; `started`: seconds since the epoch."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    times = [row["time"] for row in rows if "loss" in row]
    if len(times) < 2:
        return {}
    steps = [after - before for before, after in itertools.pairwise(times)]
    return {
        "first_step_s": round(times[0] - started, 1),
        "step_s": round(statistics.median(steps), 4),
        "training_s": round(times[-1] - times[0], 1),
        "steps": len(times),
    }


def _reserved_gib(log: Path) -> str:
    """The peak of reserved memory that the job logs at its end; "" without one."""
    if log.is_file():
        for line in log.read_text().splitlines():
            if "Peak of reserved" in line:
                return line.split()[-2]
    return ""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="flux")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--shapes", type=int, default=1, help="of the images")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    flags = parser.parse_intermixed_args(arguments)
    if not (flags.folder / "pictures").is_dir():
        write_images(flags.folder / "pictures", flags.shapes)
        write_model(flags.folder / "model", flags.family)
    if not flags.settings:
        return
    settings = dict(setting.split("=", 1) for setting in flags.settings)
    for number in range(1, 3 if flags.again else 2):
        print(json.dumps(run(flags.folder, base_of(flags.family), settings, number)), flush=True)
