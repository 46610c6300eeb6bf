"""Time to encode images and captions into an empty cache, as a job does before it trains, on one GPU and on several.

    python -m bench prepare --family flux --model FOLDER --pictures 400
    python -m bench prepare --family flux --model FOLDER --pictures 10000 --gpus 1 2 4

`--model`: a folder in diffusers' layout, such as `python -m bench job` writes; without it, the family's miniature.
Starts one process for each GPU, as a job does: the first scans, all encode their share. `texts_s`, `latents_s`: until
all have encoded theirs, with loading the encoder. `images_s`: images per second of `latents_s`; `of_linear`: that,
relative to the first row times the number of GPUs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import shapes
from bench.members import connected, rows
from bench.report import Report, options
from bench.scan import draw
from bench.step import DEVICE, SIZES, base_of
from trainer.data import encode
from trainer.data.epochs import EpochSampler
from trainer.job import prepare
from trainer.job.handover import HandedOver, hand_over, receive
from trainer.spec.family import base_models, get_family
from trainer.spec.memory_model import captions_at_once
from trainer.spec.plan import DataPlan, Dataset, EnginePlan, Source, Subset


def member(asked: argparse.Namespace, size: int) -> None:
    """One of the processes. The first of them prints the row."""
    workers = connected(size)
    family = get_family(asked.family)
    model = asked.model or Path(next(m.source for m in family.FACTS.models.values() if m.is_miniature))
    image_size = SIZES[asked.family] if asked.model else (128, 128)
    engine = EnginePlan(device=DEVICE, dtype="bfloat16" if DEVICE == "cuda" else "float32")
    subset = Subset(Source("folder", "bench", path=str(asked.images)))
    data = DataPlan((Dataset((subset,), image_size, batch_size=4, enable_bucket=True),))
    started = time.monotonic()
    if workers.is_first:
        found = prepare.scan_and_report(data, report=asked.cache / "report.txt").images
        plan = shapes.default_plan(base_of(asked.family), None, 4, {})
        hand_over(workers, HandedOver(plan, None, found))
    else:
        found = receive(workers, lambda: None).images
    sampler = EpochSampler(found, data, seed=0)
    cache = encode.open_cache(asked.cache, model, family=asked.family, precision=engine.dtype)
    workers.wait_for_all(lambda: None)
    scanned = time.monotonic()
    share = workers.share_cache(with_first=True)
    common: dict[str, Any] = {"family": family, "model": model, "engine": engine, "check_in": lambda: None}
    footprint = base_models()[base_of(asked.family)][1].footprint if asked.model else None
    at_once = captions_at_once(footprint, "bf16", streamed=False)
    encode.fill_texts(cache, sampler.all_captions(), **common, at_once=at_once, share=share)
    workers.wait_for_all(lambda: None)
    captions_encoded = time.monotonic()
    encode.fill_images(cache, sampler, **common, share=share)
    workers.wait_for_all(lambda: None)
    ended = time.monotonic()
    seconds = {
        "scan_s": scanned - started,
        "texts_s": captions_encoded - scanned,
        "latents_s": ended - captions_encoded,
        "all_s": ended - started,
    }
    row: dict[str, Any] = {"pictures": asked.pictures, "size": f"{image_size[0]} x {image_size[1]}", "gpus": size}
    row |= {key: round(value, 1) for key, value in seconds.items()}
    row["images_s"] = round(asked.pictures / seconds["latents_s"], 2)
    if workers.is_first:
        print(json.dumps(row), flush=True)
    workers.disconnect()


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1], help="numbers of GPUs")
    for hidden in ("--images", "--cache"):  # of a member: where they are
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.member:
        member(asked, asked.gpus[0])
        return
    report = Report(f"{asked.family}: preparing {asked.pictures} pictures", asked.markdown)
    size = SIZES[asked.family] if asked.model else (128, 128)
    of_one: float | None = None
    with tempfile.TemporaryDirectory() as name:
        images = Path(name) / "pictures"
        images.mkdir()
        draw(images, asked.pictures, round((size[0] * size[1]) ** 0.5))
        for count in asked.gpus:
            cache = Path(name) / f"cache-{count}"
            cache.mkdir()
            given = ["--family", asked.family, "--pictures", str(asked.pictures)]
            given += ["--images", str(images), "--cache", str(cache)]
            if asked.model:
                given += ["--model", str(asked.model)]
            for row in rows("prepare", given, count):
                of_one = of_one or row["images_s"] / count
                report.row({**row, "of_linear": round(row["images_s"] / (count * of_one), 3)})
