"""What many images cost: seconds, memory and files from 10³ images on, and the exponent by which each grows.

    python -m bench scale [--part images cache shards] [--counts 1000 10000 100000] [--read 2000] [--markdown FILE]

Each number of images is measured in a process of its own, whose peak of memory is the row's; so are the two parts.

images: from the names of the files to the order of an epoch. The folder has hard links
to some hundred small JPEGs, and a metadata.jsonl with a caption for each. Of the files, `--read` are read and decoded,
and what was found in them stands for the others as well: that part of the work is the same for each image, and
most of the time. Everything else is done for all of them.

cache: so many small items are written, found again by a process that opens the cache, and some of them read. Up to
MOST_FILES also as a file each, as they were before there were packs.
shards: from tar files to the order of an epoch in windows. Shards of PER_SHARD small JPEGs with a text each come from
another folder, at most some at a time, as a stream of a bucket's comes; then the tables alone are read, as the next
start does; then an epoch in windows of a tenth of the images, and the shards that each window needs. `held` is the most
bytes of shards that were here at once, as a share of all.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.report import Report
from trainer.data import scan as scanning
from trainer.data.cache import Cache, find_missing
from trainer.data.compact.examined import FileInfo
from trainer.data.epochs import EpochSampler
from trainer.data.identity import fingerprint
from trainer.data.order.windows import assign
from trainer.data.records import ImageRecord
from trainer.data.report import write_report
from trainer.data.shards.stream import ShardStream
from trainer.spec.plan import DataPlan, Dataset, Source, Subset

PARTS = ("images", "cache", "shards")
MOST_FILES = 10_000
LOADED = 1_000  # items that are read
COUNTS = (1_000, 10_000, 100_000)
READ = 2_000
KINDS = 512  # different files: a file system allows some ten thousand names of one
PER_FOLDER = 10_000
PER_SHARD = 1_000
WINDOWS = 10
SIZES = ((64, 64), (96, 64), (64, 96), (80, 64), (64, 112))
CAPTION = "picture {}, a person walks along a street in the evening light, some tag, another tag, wide view"
NO_COST = 0.05  # seconds: what takes less at the smallest number says nothing of how it grows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--read", type=int, default=READ, help="images that are read and decoded")
    flags = parser.parse_args(arguments)
    report = Report("what many images cost", flags.markdown)
    for part in flags.part:
        rows = []
        for count in flags.counts:
            command = [sys.executable, "-m", "bench.scale", part, str(count), str(min(flags.read, count))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
            report.row(rows[-1])
        if len(rows) > 1:
            report.row({"part": part, "images": "exponent", **exponents(rows)})


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By how much each cost grows: 1 is linear. From the last two rows, where the smaller one costs something."""
    before, after = rows[-2:]
    grown = math.log(after["images"] / before["images"])
    found = {}
    for key in after:
        if key in ("part", "images", "read_ms", "held") or key not in before:
            continue
        is_cost = before[key] > (NO_COST if key.endswith("_s") else 0) and after[key] > 0
        found[key] = f"{math.log(after[key] / before[key]) / grown:.2f}" if is_cost else "-"
    return found


# ---- one number of images, in a process of its own


def draw(folder: Path, count: int) -> None:
    """Hard links to small JPEGs, in folders of PER_FOLDER, and a caption for each in metadata.jsonl."""
    rng = np.random.default_rng(0)
    originals = []
    for i in range(min(count, KINDS)):
        file = folder.parent / f"{i}.jpg"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(SIZES[i % len(SIZES)]).save(file)
        originals.append(file)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as rows:
        for i in range(count):
            below = f"{i // PER_FOLDER:04}"
            if i % PER_FOLDER == 0:
                (folder / below).mkdir()
            os.link(originals[i % KINDS], folder / below / f"{i:08}.jpg")
            rows.write(json.dumps({"file_name": f"{below}/{i:08}.jpg", "text": CAPTION.format(i)}) + "\n")


class _Reader:
    """Stands in for the scan's reading: reads the first files, and repeats what was found, each with its own hash."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seconds = 0.0

    def __call__(self, files: Sequence[Path], *, cpu_workers: int, progress: object) -> Iterator[FileInfo | str]:
        del cpu_workers, progress  # as the scan calls it
        started = time.process_time()
        found = [scanning._examine(file) for file in itertools.islice(files, self.most)]
        self.seconds = time.process_time() - started
        for i in range(len(files)):
            info = found[i % len(found)]
            assert isinstance(info, FileInfo)
            yield FileInfo(f"{i:064x}", info.width, info.height, info.has_alpha, info.looks)


def measure(home: Path, count: int, read: int) -> dict[str, Any]:
    """One row. Seconds are those of one core; `read_ms` of one image, and in no other column."""
    folder = home / "pictures"
    folder.mkdir()
    draw(folder, count)
    subset = Subset(Source("folder", "bench", path=str(folder)))
    data = DataPlan((Dataset((subset,), (512, 512), batch_size=4, enable_bucket=True),))
    row: dict[str, Any] = {"part": "images", "images": count}
    reader = _Reader(read)
    scanning._examine_all = reader  # type: ignore[assignment]

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        row[name] = round(time.process_time() - started, 2)
        return result

    found = timed("scan_s", lambda: scanning.scan(data, cpu_workers=0))
    row["scan_s"] = round(row["scan_s"] - reader.seconds, 2)
    row["read_ms"] = round(1000 * reader.seconds / read, 2)
    prints = timed("fingerprint_s", lambda: fingerprint(found.images))
    timed("report_s", lambda: write_report(found, data, text=home / "report.txt", seed=0))
    sampler = timed("buckets_s", lambda: EpochSampler(found.images, data, seed=0))
    epoch = timed("order_s", lambda: sampler.epoch(0))
    timed("sizes_s", epoch.outline)
    batches = min(1_000, len(epoch))
    timed("batches_s", lambda: epoch[:batches])
    row["batch_ms"] = round(1000 * row.pop("batches_s") / batches, 3)
    row["state_kib"] = round(len(json.dumps(prints)) / 1024, 1)
    row["peak_mib"] = round(_peak_mib(), 1)
    return row


def measure_cache(home: Path, count: int) -> dict[str, Any]:
    """One row. Seconds by the clock: a disk takes part."""
    row: dict[str, Any] = {"part": "cache", "images": count}
    item = {"moments": torch.zeros(8, 8, 8)}
    captions = [CAPTION.format(i) for i in range(count)]

    def written(name: str, *, packed: bool) -> Cache:
        cache = Cache(home / name, vae="v", encoders="e")
        started = time.perf_counter()
        with cache.writing(packed=packed) as write:
            for caption in captions:
                write(cache.text_path(caption), item)
        row[f"{name}_write_s"] = round(time.perf_counter() - started, 2)
        row[f"{name}_files"] = sum(path.is_file() for path in (home / name).rglob("*"))
        return Cache(home / name, vae="v", encoders="e")

    cache = written("packs", packed=True)
    started = time.perf_counter()
    cache.refresh()
    row["packs_open_s"] = round(time.perf_counter() - started, 2)
    started = time.perf_counter()
    missing = find_missing(captions, cache.text_path, has=cache.has)
    row["packs_find_s"] = round(time.perf_counter() - started, 2)
    assert not missing
    started = time.perf_counter()
    some = captions[:: max(1, count // LOADED)][:LOADED]
    for caption in some:
        cache.load(cache.text_path(caption))
    row["packs_load_ms"] = round(1000 * (time.perf_counter() - started) / len(some), 3)
    row["peak_mib"] = round(_peak_mib(), 1)
    if count <= MOST_FILES:
        cache = written("files", packed=False)
        started = time.perf_counter()
        assert not find_missing(captions, cache.text_path, has=cache.has)
        row["files_find_s"] = round(time.perf_counter() - started, 2)
    return row


def pack(folder: Path, count: int) -> ShardStream:
    """Shards in `folder`, and the stream that they are to come by. Nothing of it is here yet."""
    drawn = folder.parent / "drawn"
    drawn.mkdir()
    draw(drawn, KINDS)
    contents = [path.read_bytes() for path in sorted(drawn.parent.glob("*.jpg"))]
    rows = []
    for first in range(0, count, PER_SHARD):
        shard = folder / f"{first // PER_SHARD:05}.tar"
        with tarfile.open(shard, "w") as archive:
            for i in range(first, min(first + PER_SHARD, count)):
                # The bytes behind a JPEG's end are read by nobody, and make each file another one.
                image = contents[i % len(contents)] + i.to_bytes(8, "big")
                for name, data in ((f"{i:08}.jpg", image), (f"{i:08}.txt", CAPTION.format(i).encode())):
                    header = tarfile.TarInfo(name)
                    header.size = len(data)
                    archive.addfile(header, io.BytesIO(data))
        rows.append((shard.name, shard.stat().st_size, "1"))
    stream = ShardStream(folder.parent / "stream", tuple(rows))
    stream.root.mkdir(parents=True)
    stream.write()
    return stream


class _Bringer(threading.Thread):
    """What `entrypoint.fetch.streams` does, from a folder in the place of a bucket."""

    def __init__(self, stream: ShardStream, far: Path) -> None:
        super().__init__(daemon=True)
        self.stream, self.far = stream, far
        self.ended = threading.Event()
        self.most = 0

    def run(self) -> None:
        while not self.ended.wait(0.02):
            self.stream.show_life()
            wanted = self.stream.wanted()
            here = list(self.stream.root.glob("*.tar"))
            self.most = max(self.most, sum(path.stat().st_size for path in here))
            for path in here:
                if path.name not in wanted:
                    path.unlink()
            for name in wanted:
                if not (self.stream.root / name).exists():
                    part = self.stream.folder / "part"
                    shutil.copyfile(self.far / name, part)
                    part.rename(self.stream.root / name)


def measure_shards(home: Path, count: int) -> dict[str, Any]:
    """One row. Seconds are those of one core."""
    far = home / "far"
    far.mkdir()
    stream = pack(far, count)
    total = sum(size for _, size, _ in stream.shards)
    subset = Subset(Source("bucket", "s3://bench/shards", path=str(stream.folder)))
    data = DataPlan((Dataset((subset,), (512, 512), batch_size=4, enable_bucket=True),))
    row: dict[str, Any] = {"part": "shards", "images": count, "shards": len(stream.shards)}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        row[name] = round(time.process_time() - started, 2)
        return result

    bringer = _Bringer(stream, far)
    bringer.start()
    try:
        timed("first_scan_s", lambda: scanning.scan(data, cpu_workers=0))
    finally:
        bringer.ended.set()
        bringer.join()
    row["held"] = round(bringer.most / total, 3)
    found = timed("next_scan_s", lambda: scanning.scan(data, cpu_workers=0))
    assert len(found.images) == count
    windows = partial(assign, size=lambda _: 1, budget=count // WINDOWS + 2 * PER_SHARD, seed=0, unit=_shard)
    sampler = timed("windows_s", lambda: EpochSampler(found.images, data, seed=0, windows=windows))
    row["windows"] = len(sampler.windows)
    epoch = timed("order_s", lambda: sampler.epoch(0))
    timed("place_s", lambda: epoch.span(sampler.steps_per_epoch(1) - 1, 1))
    timed("files_s", lambda: [sampler.files(window) for window in sampler.windows])
    row["tables_mib"] = round(sum(path.stat().st_size for path in stream.folder.rglob("*.jsonl")) / 2**20, 1)
    row["peak_mib"] = round(_peak_mib(), 1)
    return row


def _shard(image: ImageRecord) -> str:
    return str(image.file)


def _peak_mib() -> float:
    """This program's own peak memory. ru_maxrss also counts the memory of its parent when that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("count", type=int)
    parser.add_argument("read", type=int)
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as home:
        if flags.part == "images":
            row = measure(Path(home), flags.count, flags.read)
        elif flags.part == "cache":
            row = measure_cache(Path(home), flags.count)
        else:
            row = measure_shards(Path(home), flags.count)
        print(json.dumps(row))


if __name__ == "__main__":
    _main(sys.argv[1:])
