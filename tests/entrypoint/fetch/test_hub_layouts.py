"""The layouts of image datasets on the Hub: each gives the images and captions that the Hub's viewer shows."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from entrypoint.fetch.hub_dataset.hub_rows import Asked, write_dataset
from trainer.data.scan import scan
from trainer.spec.errors import DataError, SettingsError
from trainer.spec.plan import DataPlan, Dataset, Source, Subset

Files = dict[str, bytes]
TWO_CONFIGURATIONS = b"""---
configs:
- config_name: a
  data_files: a/*.parquet
- config_name: b
  data_files:
  - split: train
    path: b/x.parquet
  - split: held_out
    path: [b/y.parquet, b/z.parquet]
---
"""


def image(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(files: Files, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as container:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            container.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def packed(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as container:
        for name, data in files.items():
            container.writestr(name, data)
    return buffer.getvalue()


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def cell(seed: int) -> dict[str, Any]:
    return {"bytes": image(seed), "path": None}


def jsonl(*names: str, column: str = "file_name") -> bytes:
    """Metadata that gives each image the caption `said NAME`."""
    rows = [json.dumps({column: name, "text": f"said {name.rpartition('/')[2]}"}) for name in names]
    return "\n".join(rows).encode()


def images(*names: str) -> Files:
    return {name: image(index) for index, name in enumerate(names)}


def samples(*names: str, **beside: bytes) -> Files:
    """Files of a webdataset: for each name an image and, for each ending in `beside`, a file with that content."""
    files: Files = {}
    for index, name in enumerate(names):
        files[f"{name}.png"] = image(index)
        for ending, data in beside.items():
            files[f"{name}.{ending}"] = data.replace(b"NAME", name.encode())
    return files


def read(
    folder: Path, files: Files, *, split: str = "train", **asked: str | None
) -> tuple[list[str | None], dict[str, Any]]:
    """The captions that come of a dataset, and the facts. Every image must be whole."""
    for name, data in files.items():
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).write_bytes(data)
    out = folder / "out"
    out.mkdir()
    facts = write_dataset(folder / "set", out, Asked("DATASET_NAME=x", split, **asked), scratch=str(folder / "s"))
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        with Image.open(out / line["file_name"]) as opened:
            opened.verify()
    left = {path.name for path in out.iterdir()} - {line["file_name"] for line in lines}
    assert left == {"metadata.jsonl"}
    return [line.get("caption") for line in lines], facts


BOTH = ["said 0.png", "said 1.png"]
TWO = images("0.png", "1.png")
NAMED = jsonl("0.png", "1.png")
LAYOUTS: dict[str, tuple[Files, list[str | None]]] = {
    "a webdataset of images and texts": (
        {"a.tar": tar(samples("0", "1", txt=b"said NAME.png"))},
        BOTH,
    ),
    "one of images and JSON": (
        {"a.tar": tar(samples("0", "1", json=b'{"caption": "said NAME.png", "score": 1}'))},
        BOTH,
    ),
    "one with a JSON of more than captions and a text": (
        {"a.tar": tar(samples("0", "1", txt=b"said NAME.png", json=b'{"caption": "other"}'))},
        BOTH,
    ),
    "one in shards, in folders": (
        {f"d/shard-{s}.tar": tar(samples(f"in/{s}", txt=b"said NAME.png")) for s in "01"},
        ["said in/0.png", "said in/1.png"],
    ),
    "one in which a text is missing": (
        {
            "a.tar": tar(
                {name: data for name, data in samples("0", "1", txt=b"said NAME.png").items() if name != "0.txt"}
            )
        },
        [None, "said 1.png"],
    ),
    "one with png here and jpg there": (
        {"a.tar": tar({"0.png": image(0), "0.txt": b"said 0.png", "1.jpg": image(1), "1.txt": b"said 1.png"})},
        BOTH,
    ),
    "one that is compressed": ({"a.tar.gz": tar(samples("0", "1", txt=b"said NAME.png"), "w:gz")}, BOTH),
    "one whose texts are not UTF-8": (
        {"a.tar": tar(samples("0", txt="caf\u00e9".encode("cp1252")))},
        ["caf\u00e9"],
    ),
    "one with a split in the names": (
        {f"{split}-000.tar": tar(samples("0", txt=split.encode())) for split in ("train", "test")},
        ["train"],
    ),
    "a tar with metadata inside": (
        {"a.tar": tar({"in/metadata.jsonl": NAMED, **images("in/0.png", "in/1.png")})},
        BOTH,
    ),
    "a tar with metadata beside it": ({"a.tar": tar(TWO), "metadata.jsonl": NAMED}, BOTH),
    "a zip with metadata inside": (
        {"a.zip": packed({"in/metadata.jsonl": NAMED, **images("in/0.png", "in/1.png")})},
        BOTH,
    ),
    "a zip with metadata beside it": ({"a.zip": packed(TWO), "metadata.jsonl": NAMED}, BOTH),
    "one with a folder in it": ({"a.zip": packed(images("b/0.png", "b/1.png")), "metadata.jsonl": NAMED}, BOTH),
    "one whose name is a folder in the metadata": (
        {"images.zip": packed(TWO), "metadata.jsonl": jsonl("images/0.png", "images/1.png")},
        BOTH,
    ),
    "one with captions inside": ({"a.zip": packed(samples("0", "1", txt=b"said NAME.png"))}, BOTH),
    "two zips with metadata beside them": (
        {"d/a.zip": packed(images("0.png")), "d/b.zip": packed(images("1.png")), "d/metadata.jsonl": NAMED},
        BOTH,
    ),
    "a zip for each split, one metadata": (
        {"train.zip": packed(images("0.png")), "test.zip": packed(images("1.png")), "metadata.jsonl": NAMED},
        ["said 0.png"],
    ),
    "images with metadata in csv": (
        {**TWO, "metadata.csv": b"file_name,text\n0.png,said 0.png\n1.png,said 1.png\n"},
        BOTH,
    ),
    "images with metadata in parquet": (
        {**TWO, "metadata.parquet": parquet(file_name=["0.png", "1.png"], text=BOTH)},
        BOTH,
    ),
    "images with metadata in a json": (
        {**TWO, "metadata.json": b'{"0": "said 0.png", "1": {"text": "said 1.png"}}'},
        [
            "said 0.png",
            None,
        ],
    ),
    "images with another list": ({**TWO, "captions.csv": b"image;caption\n0.png;said 0.png\n1.png;said 1.png\n"}, BOTH),
    "a folder for each split": (
        {f"{s}/{n}": d for s in ("train", "test") for n, d in {**TWO, "metadata.jsonl": NAMED}.items()},
        BOTH,
    ),
    "a folder for each split, one metadata": (
        {**images("train/0.png", "test/1.png"), "metadata.jsonl": jsonl("train/0.png", "test/1.png")},
        ["said 0.png"],
    ),
    "a split in the names of tables": (
        {f"data/{s}-00000-of-00001.parquet": parquet(image=[cell(1)], text=[s]) for s in ("train", "test")},
        ["train"],
    ),
    "tables that name image files": (
        {
            **images("images/0.png", "images/1.png"),
            "a.parquet": parquet(image=["images/0.png", "images/1.png"], text=BOTH),
        },
        BOTH,
    ),
    "a list of a split that names image files": (
        {
            **images("images/0.png", "images/1.png"),
            "train.jsonl": jsonl("images/0.png", "images/1.png", column="image"),
        },
        BOTH,
    ),
    "a table with paths in its images": (
        {**images("i/0.png"), "a.parquet": parquet(image=[{"bytes": None, "path": "i/0.png"}], text=["x"])},
        ["x"],
    ),
    "captions inside another column": (
        {"a.parquet": parquet(image=[cell(1)], about=[{"caption": "inside", "number": 1}])},
        ["inside"],
    ),
    "several captions": ({"a.parquet": parquet(image=[cell(1)], captions=[["one", "two"]])}, ["one\ntwo"]),
    "several images": ({"a.parquet": parquet(images=[[cell(1), cell(2)]], text=["x"])}, ["x", "x"]),
    "several images with as many captions": (
        {"a.parquet": parquet(images=[[cell(1), cell(2)]], texts=[["one", "two"]])},
        ["one", "two"],
    ),
    "classes by folder": (images("cat/0.png", "dog/1.png"), ["cat", "dog"]),
    "classes by folder in a split": (images("train/cat/0.png", "train/dog/1.png", "test/cat/2.png"), ["cat", "dog"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_its_images_and_captions(layout: str, tmp_path: Path) -> None:
    files, captions = LAYOUTS[layout]
    assert read(tmp_path, files)[0] == captions


# ---- subsets and splits


def two_configurations() -> Files:
    tables = {"a/x": "A", "b/x": "B", "b/y": "held out 1", "b/z": "held out 2"}
    files = {f"{name}.parquet": parquet(image=[cell(1)], text=[text]) for name, text in tables.items()}
    return {"README.md": TWO_CONFIGURATIONS, **files}


def test_a_subset_and_its_splits_can_be_chosen(tmp_path: Path) -> None:
    assert read(tmp_path, two_configurations(), configuration="b")[0] == ["B"]
    (tmp_path / "again").mkdir()
    captions, facts = read(tmp_path / "again", two_configurations(), configuration="b", split="held_out")
    assert captions == ["held out 1", "held out 2"] and facts["other_splits"] == ["train"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "several subsets and no default one: a, b. Choose one with DATASET_SUBSET"),
        ({"configuration": "c"}, "DATASET_SUBSET=c: .* has no such subset, only a, b"),
        (
            {"configuration": "b", "split": "test"},
            r"DATASET_SPLIT=test: .*\(subset b\) has no such split, only train, held_out",
        ),
    ],
)
def test_what_cannot_be_chosen_is_listed(tmp_path: Path, asked: dict[str, str], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        read(tmp_path, two_configurations(), **asked)


def test_a_default_subset_is_taken(tmp_path: Path) -> None:
    files = two_configurations()
    files["README.md"] = TWO_CONFIGURATIONS.replace(b"- config_name: b\n", b"- config_name: b\n  default: true\n")
    assert read(tmp_path, files)[0] == ["B"]


def test_a_dataset_without_subsets_refuses_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"DATASET_SUBSET=b: .* has no subsets"):
        read(tmp_path, {"a.parquet": parquet(image=[cell(1)])}, configuration="b")


def test_folders_of_images_can_be_subsets(tmp_path: Path) -> None:
    card = b"---\nconfigs:\n- config_name: a\n  data_dir: a\n- config_name: b\n  data_dir: b\n---\n"
    files = {"README.md": card, **images("a/0.png", "b/1.png"), "a/metadata.jsonl": jsonl("0.png")}
    files["b/metadata.jsonl"] = jsonl("1.png")
    assert read(tmp_path, files, configuration="b")[0] == ["said 1.png"]


def test_a_head_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the head of its README\.md cannot be read"):
        read(tmp_path, {"README.md": b"---\nconfigs: 3\n---\n", **TWO})


@pytest.mark.parametrize("name", ["null", "3", "[a]"])
def test_a_configuration_whose_name_is_no_text_is_named(tmp_path: Path, name: str) -> None:
    card = f"---\nconfigs:\n- config_name: {name}\n  data_dir: a\n---\n".encode()
    with pytest.raises(DataError, match=r"README\.md (has a configuration whose config_name|cannot be read)"):
        read(tmp_path, {"README.md": card, **TWO}, configuration="b")


# ---- columns


def test_columns_of_a_webdataset_can_be_named(tmp_path: Path) -> None:
    files = {"a.tar": tar(samples("0", txt=b"short", json=b'{"caption": "long", "tags": ["a", "b"]}'))}
    assert read(tmp_path, files, caption_column="json.caption", image_column="png")[0] == ["long"]
    (tmp_path / "again").mkdir()
    captions, facts = read(tmp_path / "again", files, caption_column="__key__")
    assert captions == ["0"] and facts["unused_columns"] == ["json.caption", "json.tags", "txt"]


def test_two_images_of_a_sample_ask_for_a_choice(tmp_path: Path) -> None:
    files = {"a.tar": tar({"0.png": image(0), "0.mask.png": image(1), "0.txt": b"x"})}
    with pytest.raises(SettingsError, match=r"several columns of images.*mask\.png, png.*IMAGE_COLUMN"):
        read(tmp_path, files)


def test_two_images_of_a_row_of_metadata_ask_for_a_choice(tmp_path: Path) -> None:
    row = b'{"input_file_name": "0.png", "output_file_name": "1.png", "text": "x"}'
    with pytest.raises(SettingsError, match=r"several columns of images.*input, output"):
        read(tmp_path, {**TWO, "metadata.jsonl": row})
    (tmp_path / "again").mkdir()
    assert read(tmp_path / "again", {**TWO, "metadata.jsonl": row}, image_column="output")[0] == ["x"]


def test_columns_that_take_no_part_are_named(tmp_path: Path) -> None:
    columns = {"image": [cell(1)], "text": ["x"], "score": [0.5], "about": [{"who": "me", "n": 1}]}
    facts = read(tmp_path, {"a.parquet": parquet(**columns)})[1]
    assert facts["unused_columns"] == ["score", "about.who", "about.n"]


def test_texts_that_are_no_captions_are_named(tmp_path: Path) -> None:
    facts = read(tmp_path, {"a.parquet": parquet(image=[cell(1)], author=["me"], about=[{"who": "me"}])})[1]
    assert facts["notes"] == ["no column looks like captions. CAPTION_COLUMN can name one of: author, about.who."]


def test_several_captions_are_said(tmp_path: Path) -> None:
    facts = read(tmp_path, {"a.parquet": parquet(image=[cell(1)], captions=[["one", "two"]])})[1]
    assert "rows with several captions: 1. The first is trained" in facts["notes"][0]


def test_addresses_of_images_are_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="only names by their addresses are not fetched: download them first"):
        read(tmp_path, {"a.parquet": parquet(url=["https://x.org/1.png"], text=["x"])})


# ---- files


def test_files_that_take_no_part_are_named(tmp_path: Path) -> None:
    facts = read(
        tmp_path, {**images("0.png", "1.png", "2.png"), "0.txt": b"y", "metadata.jsonl": jsonl("0.png", "1.png")}
    )[1]
    assert facts["notes"] == [
        "images that its metadata does not list are not used: 2.png.",
        "files that are not used: 0.txt.",
    ]


def test_metadata_that_fits_no_image_shows_both(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metadata\.jsonl names no image.*'other/0\.png'.*holds 'a/0\.png'"):
        read(tmp_path, {**images("a/0.png"), "metadata.jsonl": jsonl("other/0.png")})


def test_a_row_with_too_many_fields_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metadata\.csv, row 2: it has 4 fields, the header has 3"):
        read(tmp_path, {**TWO, "metadata.csv": b"file_name,text,author\n0.png,a dragon, flying,me\n"})


# ---- tables are read as those of a local folder


def test_a_caption_with_commas_and_without_quotes_is_whole(tmp_path: Path) -> None:
    captions, facts = read(tmp_path, {**TWO, "metadata.csv": b"file_name,text\n0.png,a dragon, flying\n1.png,b\n"})
    assert captions == ["a dragon, flying", "b"]
    assert any("without double quotes in the caption of 1 row" in note for note in facts["notes"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", b"File Name; Image Caption\n0.png; a, b, c, d\n1.png; e\n"),
        ("Metadata.TSV", b"file_name\ttext\n0.png\ta, b, c, d\n1.png\te\n"),
        ("metadata.ndjson", b'{"image_path": "0.PNG", "prompt": "a, b, c, d"}\n{"image_path": "1", "prompt": "e"}\n'),
        ("metadata.jsonl", b'[{"file_name": "0.jpg", "text": "a, b, c, d"},\n{"file_name": 1, "text": "e"}]\n'),
        (
            "metadata.json",
            b'{"v": 1, "images": [{"file": "0", "text": "a, b, c, d"}, {"file": "1", "text": "e"}]}',
        ),
    ],
)
def test_headers_delimiters_and_names_are_read_in_every_spelling(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(tmp_path, {**TWO, name: content})[0] == ["a, b, c, d", "e"]


def test_an_image_in_an_archive_is_named_in_another_case(tmp_path: Path) -> None:
    files = {"images.zip": packed(TWO), "metadata.csv": b"file_name,text\nIMAGES/0.PNG,zero\n1,one\n"}
    assert read(tmp_path, files)[0] == ["zero", "one"]


def test_a_key_that_is_there_twice_refuses_the_dataset(tmp_path: Path) -> None:
    row = b'{"file_name": "0.png", "text": "x", "text": "y"}'
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1: not JSON: the key 'text' is given twice"):
        read(tmp_path, {**TWO, "metadata.jsonl": row})


def test_an_archive_that_leads_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tar is refused: '\.\./0\.png' leads out of the folder"):
        read(tmp_path, {"a.tar": tar({"../0.png": image(0)})})


def test_captions_beside_images_belong_to_their_split(tmp_path: Path) -> None:
    files = {f"{split}/{name}": data for split in ("train", "test") for name, data in samples("0", txt=b"x").items()}
    for name, data in files.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    (tmp_path / "out").mkdir()
    facts = write_dataset(tmp_path / "set", tmp_path / "out", Asked("X", "test"), scratch=str(tmp_path / "s"))
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert names == ["test/0.png", "test/0.txt"] and facts["images"] == 1


# ---- folders whose names mean something

KOHYA = images("img/10_ohwx woman/0.png", "img/10_ohwx woman/1.png", "reg/1_woman/0.png")


@pytest.mark.parametrize("files", [KOHYA, {"kohya.zip": packed(KOHYA)}, {"1_a.tar": tar(KOHYA)}])
def test_images_stay_in_kohyas_folders_and_their_names_are_no_captions(tmp_path, files):
    for name, data in files.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    out = tmp_path / "out"
    out.mkdir()
    write_dataset(tmp_path / "set", out, Asked("DATASET_NAME=x", "train"), scratch=str(tmp_path / "s"))
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")) == [
        "img/10_ohwx woman/000000.png",
        "img/10_ohwx woman/000001.png",
        "reg/1_woman/000002.png",
    ]
    source = Source("hub", "org/x", path=str(out))
    found = scan(DataPlan((Dataset((Subset(source),), (64, 64), bucket_no_upscale=False),)), cpu_workers=0)
    assert [(image.caption, image.convention) for image in found.images] == [
        ("ohwx woman", "x10"),
        ("ohwx woman", "x10"),
        ("woman", "x1-reg"),
    ]


def test_numbers_of_shards_are_no_repeats(tmp_path):
    said, _ = read(tmp_path, {f"{s}_part.tar": tar(samples(f"in/{s}", txt=b"said NAME.png")) for s in "12"})
    assert said == ["said in/1.png", "said in/2.png"]
