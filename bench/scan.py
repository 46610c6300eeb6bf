"""Time and memory to scan, bucket and order many small images: one JSON line.

python -m bench.scan [--pictures 10000] [--side 256] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.data.epochs import EpochSampler
from trainer.data.scan import scan_checked
from trainer.spec.plan import DataPlan, Dataset, Source, Subset

ASPECTS = (0.5, 0.75, 1.0, 1.333, 1.778)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=256, help="square root of an image's area, in pixels")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), flags.pictures, flags.side)
        print(json.dumps(measure(Path(folder), flags.workers)))


def draw(folder: Path, count: int, side: int) -> None:
    """`count` different JPEG files with captions, of five aspect ratios."""
    rng = np.random.default_rng(0)
    coarse_8 = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)

    def write(i: int) -> None:
        width = round(side * ASPECTS[i % len(ASPECTS)] ** 0.5)
        coarse = Image.fromarray(coarse_8[i])
        coarse.resize((width, side * side // width)).save(folder / f"{i:06}.jpg")
        (folder / f"{i:06}.txt").write_text(f"picture {i}, some tag, another tag", encoding="utf-8")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(write, range(count)):
            pass


def measure(folder: Path, cpu_workers: int) -> dict[str, float]:
    """Seconds of each part, and the peak memory of this process and of the largest worker together."""
    subset = Subset(Source("folder", "bench", path=str(folder)), num_repeats=2, flip_aug=True, shuffle_caption=True)
    data = DataPlan((Dataset((subset,), (512, 512), batch_size=4, enable_bucket=True),))
    started = time.perf_counter()
    scan = scan_checked(data, cpu_workers=cpu_workers)
    scanned = time.perf_counter()
    sampler = EpochSampler(scan.images, data, seed=0)
    batches = sampler.epoch(0)
    views = sum(1 for _ in sampler.all_image_variants())
    captions = len(set(sampler.all_captions()))
    ordered = time.perf_counter()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "pictures": scan.num_found,
        "used": len(scan.images),
        "batches": len(batches),
        "buckets": len(sampler.buckets),
        "views": views,
        "captions": captions,
        "scan_s": round(scanned - started, 2),
        "order_s": round(ordered - scanned, 2),
        "seconds": round(ordered - started, 2),
        "workers": cpu_workers,
        "peak_mib": round((_own_peak() + cpu_workers * children) / 1024, 1),
    }


def _own_peak() -> int:
    """This program's own peak memory in KiB. ru_maxrss also counts the memory of its parent when that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(sys.argv[1:])
