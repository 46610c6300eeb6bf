"""A folder of WebDataset shards gives the images and captions that the unpacked files would give."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.support import shards
from trainer.data.compact.image_table import ImageTable
from trainer.data.epochs import EpochSampler
from trainer.data.records import Scan
from trainer.data.render import render
from trainer.data.scan import scan
from trainer.data.shards import table
from trainer.data.shards.members import read_members
from trainer.data.shards.table import AskedCaptions
from trainer.spec.errors import DataError
from trainer.spec.plan import DataPlan, Dataset, Source, Subset


def plan_of(folder: Path, **keys) -> DataPlan:
    column = keys.pop("caption_column", None)
    subset = Subset(Source("folder", folder.name, path=str(folder), caption_column=column), **keys)
    return DataPlan((Dataset((subset,), (64, 64)),))


def scanned(folder: Path, *, workers: int = 0, **keys) -> Scan:
    return scan(plan_of(folder, **keys), cpu_workers=workers)


def captions(found: Scan) -> dict[str, str | None]:
    return {image.name: image.caption for image in found.images}


def test_shards_give_what_their_unpacked_files_give(tmp_path):
    folder = shards.make(tmp_path / "packed", 2, 3)
    unpacked = tmp_path / "unpacked"
    for shard in sorted(folder.iterdir()):
        with tarfile.open(shard) as archive:
            archive.extractall(unpacked / shard.name, filter="data")
    found, expected = scanned(folder, workers=2), scanned(unpacked)
    assert len(found.images) == 6
    for mine, its in zip(found.images, expected.images, strict=True):
        assert (mine.name, mine.sha256, mine.caption) == (its.name, its.sha256, its.caption)
        assert (mine.width, mine.height) == (its.width, its.height)
        assert mine.read(limit=1 << 20) == its.read(limit=1 << 20)
    data = plan_of(folder)
    views = EpochSampler(found.images, data, seed=0).all_image_variants()
    others = EpochSampler(expected.images, plan_of(unpacked), seed=0).all_image_variants()
    for (image, view), (other, other_view) in zip(views, others, strict=True):
        assert np.array_equal(render(image, view), render(other, other_view))
    assert {path.name for path in folder.iterdir()} == {"00000.tar", "00001.tar"}  # nothing is written there
    assert list(ImageTable(found.images)) == list(found.images)


def test_captions_are_texts_or_json(tmp_path):
    files = [
        ("a/1.jpg", shards.image(1, suffix="jpg")),
        ("a/1.txt", "first Größe".encode()),
        ("a/2.jpg", shards.image(2, suffix="jpg")),
        ("a/2.json", json.dumps({"caption": " second ", "width": 3}).encode()),
        ("a/3.jpg", shards.image(3, suffix="jpg")),
        ("a/4.jpg", shards.image(4, suffix="jpg")),
        ("a/4.json", b"{not json"),
        ("a/1.cls", b"7"),
    ]
    shards.write(tmp_path / "s" / "x.tar", files)
    found = scanned(tmp_path / "s")
    assert captions(found) == {
        "x.tar/a/1.jpg": "first Größe", "x.tar/a/2.jpg": "second", "x.tar/a/3.jpg": None, "x.tar/a/4.jpg": None,
    }  # fmt: skip
    unused = "\n".join(found.unused)
    assert "x.tar/a/4.json: a/4.json: not JSON" in unused and "x.tar/a/1.cls" in unused
    assert any("2 captions missing" in note or "2 captions" in note for note in found.notes), found.notes
    assert captions(scanned(tmp_path / "s", class_tokens="thing"))["x.tar/a/3.jpg"] == "thing"


@pytest.mark.parametrize(
    ("column", "expected"), [("cls", "7"), ("txt", "the text"), ("json.prompt", "asked"), ("prompt", "asked")]
)
def test_caption_column_is_an_ending_or_a_key_of_the_json(tmp_path, column, expected):
    files = [
        ("1.png", shards.image(1)), ("1.txt", b"the text"), ("1.cls", b"7"),
        ("1.json", json.dumps({"caption": "usual", "prompt": "asked"}).encode()),
    ]  # fmt: skip
    shards.write(tmp_path / "s" / "x.tar", files)
    assert list(captions(scanned(tmp_path / "s", caption_column=column)).values()) == [expected]


def test_a_name_that_comes_twice_is_used_once_and_said(tmp_path):
    files = [("1.png", shards.image(1)), ("1.txt", b"one"), ("1.png", shards.image(2)), ("1.txt", b"two")]
    shards.write(tmp_path / "s" / "x.tar", files)
    found = scanned(tmp_path / "s")
    assert list(captions(found).values()) == ["one"]
    assert sum("this name twice" in line for line in found.unused) == 2


def test_an_image_that_is_none_is_skipped_with_its_name(tmp_path):
    files = [*shards.samples(0, 9), ("z.png", b"no image"), ("z.txt", b"text"), ("y.heic", b"x")]
    shards.write(tmp_path / "s" / "x.tar", files)
    skipped = {item.name: item.reason for item in scanned(tmp_path / "s").skipped}
    assert skipped.keys() == {"x.tar/z.png", "x.tar/y.heic"} and "not an image" in skipped["x.tar/z.png"]


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "zeros"])
def test_a_damaged_shard_is_named_and_what_comes_before_the_damage_is_used(tmp_path, damage):
    folder = shards.make(tmp_path / "s", 12, 2)
    hurt = folder / "00004.tar"
    if damage == "cut":
        os.truncate(hurt, read_members(hurt).files[2].offset + 10)
    elif damage == "garbage":
        data = bytearray(hurt.read_bytes())
        second = read_members(hurt).files[2].offset - 512
        data[second : second + 512] = b"\x55" * 512
        hurt.write_bytes(data)
    else:
        hurt.write_bytes(b"" if damage == "empty" else bytes(10240))
    found = scanned(folder)
    left = {"cut": 1, "garbage": 1}.get(damage, 0)
    assert len(found.images) >= 22 + left
    assert any("WARNING" in note and "00004.tar" in note and "Bring them again" in note for note in found.notes)
    found.check(strict=False)


def test_many_damaged_shards_refuse_the_dataset(tmp_path):
    folder = shards.make(tmp_path / "s", 3, 2)
    (folder / "00001.tar").write_bytes(b"<html>no such file</html>" * 100)
    with pytest.raises(DataError, match=r"00001\.tar.*1 of 3 shards"):
        scanned(folder).check(strict=False)


def test_what_shards_cannot_have_is_refused_with_the_fix(tmp_path):
    folder = shards.make(tmp_path / "s", 1, 2)
    with pytest.raises(DataError, match=r"metadata_file=x\.csv.*Fix: leave metadata_file out"):
        scanned(folder, metadata_file="x.csv")
    shutil.copy(folder / "00000.tar", folder / "00001.tar.gz")
    with pytest.raises(DataError, match=r"compressed archives beside its shards: 00001\.tar\.gz.*Fix: make them"):
        scanned(folder)


def test_tars_beside_images_are_no_shards(tmp_path, make_folder):
    folder = make_folder("a", 2)
    shards.write(folder / "x.tar", shards.samples(0, 1))
    found = scanned(folder)
    assert len(found.images) == 2 and any("1 .tar" in note for note in found.notes)


def test_a_link_or_a_name_that_leads_out_of_a_shard_is_left_out(tmp_path):
    path = shards.write(tmp_path / "s" / "x.tar", [("../1.png", shards.image(1)), *shards.samples(5, 1)])
    with tarfile.open(path, "a") as shard:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(link)
    found = scanned(tmp_path / "s")
    assert list(captions(found)) == ["x.tar/000005.png"]
    assert any("leads out" in line for line in found.unused) and any("a link" in line for line in found.unused)


def test_a_table_survives_its_lines(tmp_path):
    files = [*shards.samples(0, 2), ("z.png", b"no image"), ("1.cls", b"7")]
    made = table.read_table(shards.write(tmp_path / "x.tar", files), AskedCaptions(".caption"))
    assert table.from_lines(table.to_lines(made)) == made and len(made.samples) == 3
