"""Encoding pictures and captions into an empty cache, as a job does before it trains.

    python -m bench prepare --family flux --model FOLDER --pictures 400

`--model`: a folder in diffusers' layout, such as `python -m bench job` writes; without it, the family's miniature.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

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
    asked = parser.parse_args(arguments)
    kind = get_family(asked.family)
    model = asked.model or Path(next(m.source for m in kind.FACTS.models.values() if m.is_miniature))
    size = SIZES[asked.family] if asked.model else (128, 128)
    engine = EnginePlan(device=DEVICE, dtype="bfloat16" if DEVICE == "cuda" else "float32")
    report = Report(f"{asked.family}: preparing {asked.pictures} pictures", asked.markdown)
    with tempfile.TemporaryDirectory() as name:
        images = Path(name) / "pictures"
        images.mkdir()
        draw(images, asked.pictures, round((size[0] * size[1]) ** 0.5))
        subset = Subset(Source("folder", "bench", path=str(images)))
        data = DataPlan((Dataset((subset,), size, batch_size=4, enable_bucket=True),))
        begun = time.monotonic()
        order = EpochSampler(prepare.scan_and_report(data, report=Path(name) / "report.txt").images, data, seed=0)
        scanned = time.monotonic()
        cache = encode.open_cache(Path(name) / "cache", model, precision=engine.dtype)
        parts = {"family": kind, "model": model, "tick": lambda: None}
        encode.fill_texts(cache, list(order.all_captions()), engine=engine, **parts)
        texts = time.monotonic()
        encode.fill_images(cache, order, engine=engine, **parts)
        done = time.monotonic()
    seconds = {"scan_s": scanned - begun, "texts_s": texts - scanned, "latents_s": done - texts, "all_s": done - begun}
    report.row(
        {"pictures": asked.pictures, "size": f"{size[0]} x {size[1]}"} | {k: round(v, 1) for k, v in seconds.items()}
    )
