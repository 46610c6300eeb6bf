"""What people write for a place of images: taken if it can mean one thing only, else refused with the fix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from entrypoint.dataset_config import sources
from entrypoint.dataset_config.sources import classify, no_such_folder


@pytest.mark.parametrize(
    ("written", "name", "revision"),
    [
        ("https://huggingface.co/datasets/owner/name", "owner/name", None),
        ("https://huggingface.co/datasets/owner/name/", "owner/name", None),
        ("https://huggingface.co/datasets/owner/name/tree/main", "owner/name", None),
        ("https://huggingface.co/datasets/owner/name/tree/v2", "owner/name", "v2"),
        (
            "https://huggingface.co/datasets/owner/name/tree/refs%2Fconvert%2Fparquet",
            "owner/name",
            "refs/convert/parquet",
        ),
        ("https://huggingface.co/datasets/owner/name/viewer/default/train?row=3", "owner/name", None),
        ("http://hf.co/datasets/owner/name", "owner/name", None),
        ("huggingface.co/datasets/owner/name", "owner/name", None),
        ("datasets/owner/name", "owner/name", None),
        ("hf://datasets/owner/name", "owner/name", None),
        ("hf://datasets/owner/name@v2", "owner/name", "v2"),
        ("owner/name@v2", "owner/name", "v2"),
        ("https://huggingface.co/datasets/mnist", "mnist", None),
    ],
)
def test_the_address_of_a_dataset_is_its_name(written: str, name: str, revision: str | None) -> None:
    place = classify(written)
    assert (place.kind, place.location) == ("hub", name)
    assert place.revision in (revision, "refs/convert/parquet" if revision else None)
    assert place.note and name in place.note and "row=" not in place.note


@pytest.mark.parametrize(
    ("written", "url"),
    [
        (
            "https://huggingface.co/datasets/owner/name/blob/main/a.zip",
            "https://huggingface.co/datasets/owner/name/resolve/main/a.zip",
        ),
        (
            "https://huggingface.co/datasets/owner/name/resolve/main/a.zip?download=true",
            "https://huggingface.co/datasets/owner/name/resolve/main/a.zip?download=true",
        ),
        ("https://github.com/x/y/blob/main/a.zip", "https://github.com/x/y/raw/main/a.zip"),
    ],
)
def test_a_page_of_an_archive_is_the_archive(written: str, url: str) -> None:
    place = classify(written)
    assert (place.kind, place.location) == ("archive", url)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("https://huggingface.co/owner/model", "not the page of a dataset"),
        ("https://huggingface.co/datasets/owner/name/blob/main/a.png", "a part of the Hub dataset owner/name"),
        ("https://huggingface.co/datasets/owner/name/tree/main/images", "a part of the Hub dataset owner/name"),
        ("https://1drv.ms/u/s!abc", "OneDrive"),
        (
            "ftp://bucket/photos",
            "Allowed: http and https URLs, s3://, gs://, az:// and hf://buckets/. Fix: download it",
        ),
        ("s3://bucket/photos.rar", "an archive of a format that is not read"),
        ("https://huggingface.co/buckets/me/photos", "Fix: write hf://buckets/me/photos, with a path"),
        ("https://huggingface.co/buckets/me/photos/tree/main", "Fix: write hf://buckets/me/photos, with a path"),
        ("https://huggingface.co/buckets/me/photos/resolve/x/y.zip", "Fix: write hf://buckets/me/photos/x/y.zip"),
        ("hf://buckets/me", "is not written as hf://buckets/OWNER/BUCKET/PATH"),
        ("hf://buckets/me/photos/../../you/secret", "is not written as hf://buckets/OWNER/BUCKET/PATH"),
        ("hf://buckets/me/photos?token=1", "is not written as hf://buckets/OWNER/BUCKET/PATH"),
        ("hf://buckets/me/photos.rar", "an archive of a format that is not read"),
        ("s3://bucket/a.zip?X-Amz-Signature=1", "keys go into variables"),
        ("https://[x/a.zip", "is no address: its host or port is not written as one"),
        ("https://h:99999/a.zip", "is no address: its host or port is not written as one"),
        ("s3://[x/a.zip", "is no address: its host is not written as one"),
        ("file://[x/a", "is no address: its host is not written as one"),
        ("C:\\Users\\me\\photos", r"a path of Windows.*mount the folder .*-v \"C:\\Users\\me\\photos:/data\""),
        ("c:/Users/me/photos/", r"a path of Windows.*:/data"),
        ("\\\\server\\share\\photos", "a path of Windows"),
        ("photos\\cats", "has backslashes. Fix: write photos/cats"),
        ("a.7z", "unpack it and name the folder"),
        ("photos.part1.rar", "unpack it"),
        ("photos.zip.001", "unpack it"),
        ("shard-{000..003}.tar", "several places.*one folder"),
        ("photos/*", "several places"),
        ("photos, more", "several places"),
        ("file://server/photos", "without file:"),
        ("   ", "an empty name"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_the_fix(written: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        classify(written)


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("s3://bucket/photos", "bucket"),
        ("hf://buckets/me/photos", "bucket"),
        ("HF://buckets/me/photos/cats and dogs", "bucket"),
        ("hf://buckets/me/photos/cats.zip", "archive"),
        ("gs://bucket", "bucket"),
        ("az://box/photos/", "bucket"),
        ("s3://bucket/photos.ZIP", "archive"),
        ("https://drive.google.com/file/d/1x/view?usp=sharing", "archive"),
        ("https://www.dropbox.com/s/x/a.zip?dl=0", "archive"),
    ],
)
def test_buckets_and_shared_links(written: str, kind: str) -> None:
    place = classify(written)
    assert (place.kind, place.location) == (kind, written)


def test_a_folder_of_google_drive_is_named_by_its_number_alone() -> None:
    for path in ("drive/folders/1AbC-dEfGhIjKl?usp=sharing", "drive/u/0/folders/1AbC-dEfGhIjKl/"):
        place = classify(f"https://drive.google.com/{path}")
        assert (place.kind, place.location) == ("bucket", "https://drive.google.com/drive/folders/1AbC-dEfGhIjKl")


def test_a_folder_of_google_drive_keeps_the_key_without_which_it_is_closed() -> None:
    number = "1AbC-dEfGhIjKl"
    place = classify(f"https://drive.google.com/drive/folders/{number}?usp=sharing&resourcekey=0-aB_c&x=1")
    assert place.location == f"https://drive.google.com/drive/folders/{number}?resourcekey=0-aB_c"
    assert classify(place.location) == place


def test_keys_in_addresses_are_not_repeated() -> None:
    for url in (
        "https://1drv.ms/x?key=canary",
        "s3://b/x?key=canary",
        "https://x.org/a.rar?key=canary",
        "ftp://x.org/a?key=canary",
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            classify(url)
        assert "canary" not in str(caught.value)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "my photos").mkdir()
    place = classify(f"file://{tmp_path}/my%20photos")
    assert (place.kind, place.location) == ("folder", str(tmp_path / "my photos"))


@pytest.mark.parametrize("written", ["photos/", "./photos", "{}/photos", "~/photos"])
def test_a_path_may_be_written_in_any_way(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert classify(written.format(tmp_path)).location == str(tmp_path / "photos")


def test_backslashes_are_read_where_the_folder_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    place = classify("photos\\cats")
    assert place.location == str(tmp_path / "photos" / "cats") and "photos/cats" in (place.note or "")


@pytest.mark.parametrize(
    ("file", "told"),
    [("a.jpg", "one image. Fix: name its folder"), ("dataset.json", "DATASET_CONFIG"), ("a.csv", "not an archive")],
)
def test_a_file_that_is_no_archive(file: str, told: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=told):
        classify(str(tmp_path / file))


def test_similar_names_are_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Photo", "fotos", "models"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert no_such_folder("photos") == f"there is no folder photos in {tmp_path}, but Photo, fotos"
    assert no_such_folder("zzz/photos/x") == f"there is no folder zzz in {tmp_path}"


def test_a_mount_at_the_root_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    at_root = next(entry.name for entry in os.scandir("/") if entry.is_dir() and entry.name.isalpha())
    assert f"; there is /{at_root}" in no_such_folder(at_root)
    assert "; there is" not in no_such_folder(at_root, from_root=False)


def test_every_service_has_a_host_that_is_refused() -> None:
    for host in sources.SHARING_HOSTS:
        with pytest.raises(ValueError, match="from which programs cannot download"):
            classify(f"https://{host}/x")
