"""Datasets in the layouts of the Hub, read by the `datasets` library: columns, captions, pictures, refusals."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from entrypoint.fetch.hub_dataset import hub_rows
from entrypoint.fetch.hub_dataset.hub_choice import choose
from entrypoint.fetch.hub_dataset.hub_columns import find_caption_column
from entrypoint.fetch.hub_dataset.hub_rows import Asked, write_dataset
from trainer.spec.errors import DataError, SettingsError

TEXT = datasets.Value("string")
Read = Callable[..., dict[str, str | None]]


def image(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def cell(seed: int, kind: str = "PNG") -> dict[str, Any]:
    return {"bytes": image(seed, kind), "path": None}


def table(lines: list[dict[str, Any]], features: dict[str, Any], *, group: int = 100) -> bytes:
    """A parquet file with the marks that `datasets` leaves in one, which itself would follow paths in the rows."""
    buffer = io.BytesIO()
    made = pa.Table.from_pylist(lines, schema=datasets.Features(features).arrow_schema)
    pq.write_table(made, buffer, row_group_size=group)
    return buffer.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """`read({name: content}, ...)`: names and captions of the pictures that come of it, in `tmp_path`/out."""

    def run(
        files: dict[str, bytes], *, split: str = "train", image: str | None = None, caption: str | None = None
    ) -> Any:
        for name, data in files.items():
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(data)
        out = tmp_path / "out"
        out.mkdir()
        asked = Asked("DATASET_NAME=x", split, image_column=image, caption_column=caption)
        write_dataset(tmp_path / "set", out, asked, scratch=str(tmp_path / "s"))
        lines = (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        return {line["file_name"]: line.get("caption") for line in map(json.loads, lines)}

    return run


def test_bytes_are_untouched_and_suffixes_are_what_the_bytes_are(read: Read, tmp_path: Path) -> None:
    kinds = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
    lines = [{"image": {"bytes": image(i, kind), "path": "wrong.png"}} for i, kind in enumerate(kinds)]
    names = read({"train.parquet": table(lines, {"image": datasets.Image()})})
    assert list(names) == [f"{i:06d}{suffix}" for i, suffix in enumerate(kinds.values())]
    written = [(tmp_path / "out" / name).read_bytes() for name in names]
    assert written == [image(i, kind) for i, kind in enumerate(kinds)]


def test_two_columns_of_pictures_ask_for_a_choice(read: Read) -> None:
    data = table([{"photo": cell(1), "mask": cell(2)}], {"photo": datasets.Image(), "mask": datasets.Image()})
    with pytest.raises(SettingsError, match=r"IMAGE_COLUMN.*photo, mask"):
        read({"train.parquet": data})


def test_named_columns_are_taken(read: Read, tmp_path: Path) -> None:
    line = {"photo": cell(1), "mask": cell(2), "said": "hello", "text": "no"}
    features = {"photo": datasets.Image(), "mask": datasets.Image(), "said": TEXT, "text": TEXT}
    assert read({"train.parquet": table([line], features)}, image="photo", caption="said") == {"000000.png": "hello"}
    assert (tmp_path / "out" / "000000.png").read_bytes() == image(1)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"image": "no"}, "IMAGE_COLUMN=no.*only image, text, number"),
        ({"image": "text"}, "IMAGE_COLUMN=text.*holds no images"),
        ({"caption": "no"}, "CAPTION_COLUMN=no.*only text, number"),
        ({"caption": "number"}, "CAPTION_COLUMN=number.*holds no text"),
        ({"split": "test"}, "DATASET_SPLIT=test.*only train"),
    ],
)
def test_a_wrong_choice_lists_what_there_is(read: Read, asked: dict[str, str], told: str) -> None:
    features = {"image": datasets.Image(), "text": TEXT, "number": datasets.Value("int64")}
    with pytest.raises(SettingsError, match=told):
        read({"train.parquet": table([{"image": cell(1), "text": "x", "number": 1}], features)}, **asked)


def test_no_column_of_pictures(read: Read) -> None:
    with pytest.raises(SettingsError, match=r"no column of images.*text"):
        read({"train.parquet": table([{"text": "x"}], {"text": TEXT})})


def test_pictures_that_another_library_wrote(read: Read, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    made = pa.table({"img": [{"bytes": image(1), "path": "a.png"}], "raw": [image(2)], "caption": ["hi"]})
    pq.write_table(made, tmp_path / "set" / "train.parquet")
    assert read({}) == {"000000.png": "hi"}
    assert (tmp_path / "out" / "000000.png").read_bytes() == image(1)


def test_a_column_of_bare_bytes_can_be_named(read: Read, tmp_path: Path) -> None:
    data = table([{"raw": image(2, "JPEG"), "caption": "hi"}], {"raw": datasets.Value("binary"), "caption": TEXT})
    assert read({"train.parquet": data}, image="raw") == {"000000.jpg": "hi"}


def test_lists_of_captions_become_lines_and_nothing_is_no_caption(read: Read) -> None:
    said = [["one", "two"], ["one"], [" "], [], None]
    features = {"image": datasets.Image(), "Captions": datasets.List(TEXT)}
    got = read({"train.parquet": table([{"image": cell(1), "Captions": s} for s in said], features)})
    assert list(got.values()) == ["one\ntwo", "one", None, None, None]


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (["text", "Caption", "tags"], "Caption"),
        (["TAGS", "prompt"], "prompt"),
        (["id", "label"], "label"),
        (["blip_caption", "author"], "blip_caption"),
        (["id", "url"], None),
        ([], None),
    ],
)
def test_the_caption_column_is_found_by_its_name(columns: list[str], chosen: str | None) -> None:
    assert find_caption_column("X", dict.fromkeys(columns, TEXT), None, "image") == chosen


def test_columns_that_could_both_be_captions_ask_for_a_choice() -> None:
    with pytest.raises(SettingsError, match=r"CAPTION_COLUMN.*short_caption, long_caption"):
        find_caption_column("X", dict.fromkeys(["short_caption", "long_caption"], TEXT), None, "image")


def test_numbers_are_never_found_as_captions() -> None:
    assert find_caption_column("X", {"label": datasets.Value("int64")}, None, "image") is None


def test_a_row_without_a_picture_is_kept_as_an_empty_file(read: Read, tmp_path: Path) -> None:
    data = table([{"image": cell(1)}, {"image": None}, {"image": cell(3)}], {"image": datasets.Image()})
    assert list(read({"train.parquet": data})) == ["000000.png", "000001.png", "000002.png"]
    assert (tmp_path / "out" / "000001.png").read_bytes() == b""


def test_classes_by_folder_become_captions(read: Read) -> None:
    assert list(read({"cat/1.png": image(1), "dog/1.png": image(2)}).values()) == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_pictures_in_a_zip(read: Read, tmp_path: Path, kind: str) -> None:
    lines = {"csv": "file_name,text\n0.png,zero\n1.png,one\n"}
    lines["jsonl"] = '{"file_name": "0.png", "text": "zero"}\n{"file_name": "1.png", "text": "one"}\n'
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as container:
        container.writestr(f"in/metadata.{kind}", lines[kind])
        for i in range(2):
            container.writestr(f"in/{i}.png", image(i))
    assert read({"images.zip": buffer.getvalue()}) == {"000000.png": "zero", "000001.png": "one"}
    assert (tmp_path / "out" / "000001.png").read_bytes() == image(1)


def test_metadata_that_names_a_missing_picture(read: Read) -> None:
    lines = b'{"file_name": "0.png", "text": "zero"}\n{"file_name": "9.png", "text": "nine"}\n'
    assert read({"0.png": image(0), "metadata.jsonl": lines}) == {"000000.png": "zero", "000001.png": "nine"}


def test_many_rows_take_no_more_memory_than_few(tmp_path: Path) -> None:
    peaks = []
    for count in (40, 400):
        folder = tmp_path / f"{count}"
        (folder / "set").mkdir(parents=True)
        (folder / "out").mkdir()
        noise = np.random.default_rng(count)
        lines = [{"image": {"bytes": b"\xff\xd8\xff" + noise.bytes(100_000), "path": None}} for _ in range(count)]
        (folder / "set" / "train.parquet").write_bytes(table(lines, {"image": datasets.Image()}, group=10))
        tracemalloc.start()
        write_dataset(folder / "set", folder / "out", Asked("X", "train"), scratch=str(folder))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 4_000_000, peaks  # of 40 MB of pictures


# --- what is refused


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../../../../etc/hostname", "file:///etc/hostname", "http://x/y.png"]
)
def test_a_row_that_points_at_other_files(read: Read, name: str) -> None:
    data = table([{"image": {"bytes": None, "path": name}}], {"image": datasets.Image()})
    with pytest.raises(DataError, match="outside"):
        read({"train.parquet": data})


def test_a_row_that_points_into_a_zip_elsewhere(read: Read, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "elsewhere.zip", "w") as container:
        container.writestr("1.png", image(1))
    path = f"zip://1.png::{tmp_path}/set/../elsewhere.zip"
    with pytest.raises(DataError, match="outside"):
        read({"train.parquet": table([{"image": {"bytes": None, "path": path}}], {"image": datasets.Image()})})


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname"])
def test_metadata_that_points_at_other_files(read: Read, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(image(9))
    with pytest.raises(DataError):
        read({"1.png": image(1), "metadata.jsonl": json.dumps({"file_name": name, "text": "x"}).encode()})


def test_a_card_that_points_at_other_files(read: Read, tmp_path: Path) -> None:
    data = table([{"image": cell(1)}], {"image": datasets.Image()})
    (tmp_path / "outside.parquet").write_bytes(data)
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {tmp_path}/outside.parquet\n---\n"
    with pytest.raises(DataError, match="outside of itself"):
        read({"README.md": card.encode(), "train.parquet": data})


def test_several_configurations_are_told(read: Read) -> None:
    data = table([{"image": cell(1)}], {"image": datasets.Image()})
    card = "---\nconfigs:\n- config_name: a\n  data_files: a.parquet\n- config_name: b\n  data_files: b.parquet\n---\n"
    with pytest.raises(SettingsError, match="a, b"):
        read({"README.md": card.encode(), "a.parquet": data, "b.parquet": data})


@pytest.mark.parametrize("keep", [0, 3, 400, -300, -8])
def test_a_damaged_table(read: Read, keep: int) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read({"train.parquet": table([{"image": cell(1)}], {"image": datasets.Image()})[:keep]})


def test_an_empty_split(read: Read) -> None:
    with pytest.raises(DataError, match="empty"):
        read({"train.parquet": table([], {"image": datasets.Image(), "text": TEXT})})


def test_a_picture_of_absurd_size(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_rows, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(DataError, match="larger than"):
        read({"1.png": image(1)})


def test_a_zip_bomb_of_pictures(read: Read) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as container:
        for i in range(3):
            container.writestr(f"{i}.png", bytes(5_000_000))
    with pytest.raises(DataError, match="times its size"):
        read({"images.zip": buffer.getvalue()})


# --- which files are brought


def test_only_what_is_needed_is_brought() -> None:
    names = ["data/train.parquet", "README.md", "a.py", "notes.txt", "big.safetensors", ".git/x.png", "a.csv", "a.json"]
    assert set(choose("X", "org/set", names).names) == {"data/train.parquet", "README.md"}


def test_caption_files_and_metadata_are_brought() -> None:
    plain = choose("X", "org/set", ["a/1.png", "a/1.txt", "2.jpg", "readme.txt", "notes.txt"])
    assert set(plain.names) == {"a/1.png", "a/1.txt", "2.jpg"} and plain.left_out == ("notes.txt",)
    listed = choose("X", "org/set", ["1.png", "1.txt", "metadata.csv", "captions.csv"])
    assert set(listed.names) == {"1.png", "1.txt", "metadata.csv", "captions.csv"}


def test_archives_of_other_formats_are_named() -> None:
    with pytest.raises(DataError, match=r"images\.7z is an archive of another format"):
        choose("X", "org/set", ["README.md", "images.7z"])


def test_a_script_is_refused_and_other_code_is_left_alone() -> None:
    with pytest.raises(SettingsError, match="never run"):
        choose("X", "org/set", ["set.py", "train.parquet"])
    assert choose("X", "org/set", ["prepare.py", "train.parquet"]).names == ("train.parquet",)


@pytest.mark.parametrize("names", [[], ["README.md"], ["a.csv"], ["metadata.csv"], ["model.safetensors"]])
def test_a_repository_without_images(names: list[str]) -> None:
    with pytest.raises(DataError, match="no images"):
        choose("X", "org/set", names)
