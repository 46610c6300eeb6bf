"""Which unpacked archive and which rows of a Hub dataset are the ones asked for: each field of a source by itself."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from entrypoint.fetch import fetch
from entrypoint.fetch.hub_dataset import hub_rows
from trainer.spec.plan import Source

SOURCE = Source(
    "hub", "some/dataset", revision="main", split="train", subset="small", image_column="image",
    caption_column="text", count=3, commit="1" * 40, path="/cache/x", named_in="datasets[0]",
)  # fmt: skip
# Fields of a source on which its rows on disk do not depend → why.
WITHOUT_EFFECT = {
    "kind": "only a Hub dataset has rows",
    "revision": "the commit that it resolves to is in the key",
    "count": "of images to generate",
    "commit": "is given beside the source",
    "path": "what the key leads to",
    "named_in": "for messages",
}


def test_every_field_of_a_source_gives_other_rows_or_is_known_to_be_without_effect(monkeypatch):
    commit, cache = "1" * 40, Path("/cache")
    same, unchanged = fetch._dataset_folder(SOURCE, commit, cache), set()
    found = {same}
    for field in dataclasses.fields(Source):
        value = getattr(SOURCE, field.name)
        other = value + 1 if isinstance(value, int) else f"{value}x"
        folder = fetch._dataset_folder(dataclasses.replace(SOURCE, **{field.name: other}), commit, cache)
        found.add(folder)
        if folder == same:
            unchanged.add(field.name)
    assert unchanged == WITHOUT_EFFECT.keys() and len(found) == 1 + len(dataclasses.fields(Source)) - len(unchanged)
    # Names that change places, and one that is not given, are others too.
    swapped = dataclasses.replace(SOURCE, image_column="text", caption_column="image")
    without = dataclasses.replace(SOURCE, image_column=None)
    found |= {fetch._dataset_folder(source, commit, cache) for source in (swapped, without)}
    found.add(fetch._dataset_folder(SOURCE, "2" * 40, cache))
    monkeypatch.setattr(hub_rows, "VERSION", hub_rows.VERSION + 1)
    found.add(fetch._dataset_folder(SOURCE, commit, cache))
    assert len(found) == 1 + len(dataclasses.fields(Source)) - len(unchanged) + 4


@pytest.fixture
def packed(tmp_path):
    """`packed(name, content)`: an archive of one image."""

    def pack(name, content):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr(zipfile.ZipInfo("a.png"), content)
        return tmp_path / name

    return pack


def test_an_unpacked_archive_is_known_by_its_bytes_alone(packed, tmp_path):
    one, same, other = packed("a.zip", b"one"), packed("b.zip", b"one"), packed("c.zip", b"two")
    folders = []
    for path in (one, same, other):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        folders.append(fetch._unpacked(path, digest, tmp_path / "cache"))
        assert folders[-1].name == digest[:32]
    assert folders[0] == folders[1] != folders[2]
    assert [(folder / "a.png").read_bytes() for folder in folders] == [b"one", b"one", b"two"]


def test_every_letter_of_an_address_gives_another_download(tmp_path):
    urls = [
        "https://a.example/b.zip",
        "https://a.example/b.zip?x=1",
        "https://a.example/B.zip",
        "http://a.example/b.zip",
    ]
    places = {
        fetch._download_place(dataclasses.replace(SOURCE, kind="archive", location=url), tmp_path) for url in urls
    }
    assert len(places) == len(urls)
