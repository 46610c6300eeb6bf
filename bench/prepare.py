"""Time to encode images and captions into an empty cache, as a job does before it trains.

    python -m bench prepare --family flux --model FOLDER --pictures 400

`--model`: a folder in diffusers' layout, such as `python -m bench job` writes; without it, the family's miniature.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from bench.report import Report, options
from bench.scan import draw
from bench.step import DEVICE, SIZES
from trainer.data import encode
from trainer.data.epochs import EpochSampler
from trainer.job import prepare
from trainer.spec.family import get_family
from trainer.spec.plan import DataPlan, Dataset, EnginePlan, Source, Subset


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pictures", type=int, default=400)
    flags = parser.parse_args(arguments)
    family = get_family(flags.family)
    model = flags.model or Path(next(m.source for m in family.FACTS.models.values() if m.is_miniature))
    size = SIZES[flags.family] if flags.model else (128, 128)
    engine = EnginePlan(device=DEVICE, dtype="bfloat16" if DEVICE == "cuda" else "float32")
    report = Report(f"{flags.family}: preparing {flags.pictures} pictures", flags.markdown)
    with tempfile.TemporaryDirectory() as name:
        images = Path(name) / "pictures"
        images.mkdir()
        draw(images, flags.pictures, round((size[0] * size[1]) ** 0.5))
        subset = Subset(Source("folder", "bench", path=str(images)))
        data = DataPlan((Dataset((subset,), size, batch_size=4, enable_bucket=True),))
        started = time.monotonic()
        scan = prepare.scan_and_report(data, report=Path(name) / "report.txt")
        sampler = EpochSampler(scan.images, data, seed=0)
        scanned = time.monotonic()
        cache = encode.open_cache(Path(name) / "cache", model, precision=engine.dtype)
        common: dict[str, Any] = {"family": family, "model": model, "engine": engine, "check_in": lambda: None}
        encode.fill_texts(cache, sampler.all_captions(), **common)
        captions_encoded = time.monotonic()
        encode.fill_images(cache, sampler, **common)
        ended = time.monotonic()
    seconds = {
        "scan_s": scanned - started,
        "texts_s": captions_encoded - scanned,
        "latents_s": ended - captions_encoded,
        "all_s": ended - started,
    }
    row: dict[str, Any] = {"pictures": flags.pictures, "size": f"{size[0]} x {size[1]}"}
    report.row(row | {key: round(value, 1) for key, value in seconds.items()})
