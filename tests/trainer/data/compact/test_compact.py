"""Many images in little memory: columns give back what went in, and what a job holds of each image is small."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from trainer.data.compact.columns import Digests, FewValues, Texts
from trainer.data.compact.examined import Examined, FileInfo, Files, ScannedFiles
from trainer.data.compact.image_table import Chosen, ImageTable
from trainer.data.hygiene.looks import Looks
from trainer.data.records import ImageRecord

PLAIN = ImageRecord("a/0.png", Path("/pictures/a/0.png"), "0" * 63 + "1", 640, 480, 0, 0, "a cat")
OTHERS = {
    "name": "ä\u4e00/1.png",
    "file": Path("/elsewhere/x.png"),
    "sha256": "f" * 64,
    "width": 70_000,
    "height": 1,
    "dataset": 2,
    "subset": 300,
    "caption": "half a letter: \ud83d",
    "has_alpha": True,
    "mask_file": Path("/masks/0.png"),
    "mask_sha256": "alpha",
    "part_of": 7,
    "convention": "x10-reg",
    "caption_file": "metadata.csv, row 2",
    "caption_encoding": "cp1252",
    "captioned_by": "a model",
    "span": (512, 7),
}


def records() -> list[ImageRecord]:
    """Each field at another value by itself, and all of them."""
    assert OTHERS.keys() == {field.name for field in dataclasses.fields(ImageRecord)}
    changed = [dataclasses.replace(PLAIN, **{key: value}) for key, value in OTHERS.items()]
    return [PLAIN, *changed, dataclasses.replace(PLAIN, caption=None), dataclasses.replace(PLAIN, caption=""),
            ImageRecord(**OTHERS)]  # fmt: skip


def test_every_field_of_an_image_comes_out_of_the_table_as_it_went_in():
    table = ImageTable(records())
    assert list(table) == records() and [table[i] for i in range(len(table))] == records()
    assert table == records() and table == ImageTable(records()) and table != records()[1:]
    assert table[-1] == records()[-1] and table[2:5] == records()[2:5]
    for place in (len(table), -len(table) - 1):
        with pytest.raises(IndexError):
            table[place]
    chosen = Chosen(table, [3, 0])
    assert list(chosen) == [records()[3], PLAIN] and chosen[1] == PLAIN and list(chosen[:1]) == [records()[3]]


def test_texts_tell_nothing_from_no_letters():
    given = ["", None, "a", "\ud800", "\U0001f600", None, ""]
    texts = Texts()
    for text in given:
        texts.append(text)
    assert [texts[i] for i in range(len(texts))] == given


def test_few_values_are_kept_once():
    column: FewValues[str] = FewValues()
    for value in "abaca":
        column.append(value)
    assert [column[i] for i in range(5)] == list("abaca") and column.values() == ["a", "b", "c"]


def test_digests_are_those_that_went_in():
    digests = Digests()
    for digest in ("0" * 64, "0123456789abcdef" * 4):
        digests.append(digest)
    assert list(digests) == ["0" * 64, "0123456789abcdef" * 4] and len(digests) == 2


def test_what_the_scan_has_read_of_a_file_comes_out_as_it_went_in():
    looks = [
        None,
        Looks(None, None, False),
        Looks(2**64 - 1, 0.25, True, ((0.1, 0.2, 0.3, 0.4),)),
        Looks(0, 0.0, False),
    ]
    infos = [FileInfo(f"{i:064x}", 10 + i, 20 + i, has_alpha=bool(i % 2), looks=look) for i, look in enumerate(looks)]
    given = [infos[0], "a FIFO", *infos[1:]]
    files, examined = Files(), Examined()
    for i, info in enumerate(given):
        files.add(f"/a/b/{i}.png")
        examined.append(info)
    files.add("/a/b/0.png")  # once
    assert [files[i] for i in range(len(files))] == [Path(f"/a/b/{i}.png") for i in range(5)]
    found = ScannedFiles(files, examined)
    assert [found.info(f"/a/b/{i}.png") for i in range(5)] == given
    below = found.looks(Path("/a"))
    assert below["b/3.png"] == looks[2] and below["b/0.png"] is None and below.get("c") is None


MEASURE = """
import json, sys
from pathlib import Path
from trainer.data.epochs import EpochSampler
from trainer.data.identity import fingerprint
from trainer.data.report import write_report
from trainer.data.scan import scan
from trainer.spec.plan import DataPlan, Dataset, Source, Subset

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

subset = Subset(Source("folder", "x", path=sys.argv[1]), num_repeats=2, shuffle_caption=True)
data = DataPlan((Dataset((subset,), (64, 64), batch_size=4, enable_bucket=True),))
before = peak()
found = scan(data, cpu_workers=2)
fingerprint(found.images)
write_report(found, data, text=Path(sys.argv[1]).with_name("report.txt"), seed=0)
sampler = EpochSampler(found.images, data, seed=0)
epoch = sampler.epoch(0)
examples = sum(len(batch) for batch in epoch[:100])
views = sum(1 for _ in sampler.all_image_variants())
print(json.dumps([len(found.images), len(epoch), examples, views, peak() - before]))
"""
COUNT = 20_000
MOST_MIB = 36  # 1.8 KiB of each; with an object for each image it was 52


def test_scan_report_and_order_of_many_images_stay_in_little_memory(tmp_path):
    """Twenty thousand, so that 10⁶ take 2 GiB at most; `python -m bench scale` measures those."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = random.Random(0)
    kinds = []
    for i in range(64):
        file = tmp_path / f"{i}.png"
        Image.frombytes("RGB", (8, 8 + i % 5), rng.randbytes(24 * (8 + i % 5))).save(file)
        kinds.append(file)
    with (folder / "metadata.jsonl").open("w") as rows:
        for i in range(COUNT):
            os.link(kinds[i % 64], folder / f"{i:06}.png")
            caption = f"picture {i}, a street in the evening, people, wide"
            rows.write(json.dumps({"file_name": f"{i:06}.png", "text": caption}) + "\n")
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[4])
    images, batches, examples, views, grown = json.loads(done.stdout)
    assert (images, batches, examples, views) == (COUNT, COUNT // 2, 400, COUNT)
    assert grown < MOST_MIB
