"""A folder with a full-size model of random weights in diffusers' layout and pictures, and whole jobs on them.

    python -m bench job FOLDER --family flux                            # writes them
    python -m bench job FOLDER --family flux NAME=VALUE …               # and runs a job with these settings
    python -m bench job FOLDER --family flux --again NAME=VALUE …       # and another one, its caches warm

Needs an accelerator to make the weights on, and 35 GB of disk for Flux.1. Of each job: seconds from the start of the
process to the first step and to the end, the median step, and the most memory of the device that it reserved.
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

from bench.step import free, random_weights
from trainer.spec.family import get_family

PICTURES, SIZE = 20, 768


LENGTHS = {"CLIP": 77, "T5": 512}  # tokens


def write_model(folder: Path, name: str) -> None:
    from bench import full_size  # which takes the configs from here

    models = full_size.write_configs(folder, name, full_size.FULL[name])
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        settings = json.loads(path.read_text())
        kind = next(kind for kind in LENGTHS if settings["tokenizer_class"].startswith(kind))
        path.write_text(json.dumps({**settings, "model_max_length": LENGTHS[kind]}))
    for part, shape in models.items():
        started, kind, where = time.monotonic(), type(shape), get_family(name).FACTS.parts[part]
        config: Any = shape.config
        with random_weights("cuda"):
            made = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        made.save_pretrained(folder / where)
        del made
        free()
        print(f"{where} {time.monotonic() - started:.1f} s", flush=True)


def write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
        coarse.resize((SIZE, SIZE)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a picture of zot, number {i}")


def run(folder: Path, name: str, settings: dict[str, str], number: int) -> dict[str, Any]:
    out = folder / f"out-{time.time_ns()}"
    given = {
        "BASE_MODEL": name,
        "MODEL_PATH": str(folder / "model"),
        "DATASET_NAME": str(folder / "pictures"),
        "OUTPUT_PATH": str(out),
        "CACHE_PATH": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "cache" / "triton"),
        **settings,
    }
    started = time.time()
    code = subprocess.run([sys.executable, "-m", "entrypoint"], env={**os.environ, **given}, check=False).returncode
    ended = time.time()
    row: dict[str, Any] = {"job": number, "exit": code, "seconds": round(ended - started, 1)}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if not code else []
    times = [r["time"] for r in rows if "loss" in r]
    if len(times) > 1:
        steps = [b - a for a, b in itertools.pairwise(times)]
        row |= {
            "first_step_s": round(times[0] - started, 1),
            "step_s": round(statistics.median(steps), 4),
            "training_s": round(times[-1] - times[0], 1),
            "steps": len(times),
        }
    log = (out / "run.log").read_text() if (out / "run.log").is_file() else ""
    row["reserved_gib"] = next((line.split()[-2] for line in log.splitlines() if "Peak of reserved" in line), "")
    return row


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="flux")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    asked = parser.parse_intermixed_args(arguments)
    if not (asked.folder / "pictures").is_dir():
        write_pictures(asked.folder / "pictures")
        write_model(asked.folder / "model", asked.family)
    settings = dict(setting.split("=", 1) for setting in asked.settings)
    for number in [1, 2][: 1 + asked.again] if settings else []:
        print(json.dumps(run(asked.folder, asked.family, settings, number)), flush=True)
