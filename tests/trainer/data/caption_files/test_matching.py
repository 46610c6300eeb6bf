"""Rows find the image that they name, however the name was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.caption_files.matching import ImageNames

NAMES = ["a.png", "b.PNG", "c.jpg", "c.png", "sub/e.png", "other/e.png", "caf\u00e9.png", "v.2.png"]


def find(entry: str, names: list[str] = NAMES, folder: str = "/data/Train") -> list[str]:
    return ImageNames(names, folder=Path(folder)).find(entry)


@pytest.mark.parametrize(
    ("entry", "images"),
    [
        ("a.png", ["a.png"]),
        ("./a.png", ["a.png"]),
        (" a.png ", ["a.png"]),
        ("a", ["a.png"]),
        ("v.2", ["v.2.png"]),
        ("c", ["c.jpg", "c.png"]),
        ("b.png", ["b.PNG"]),
        ("A.JPG", ["a.png"]),
        ("c.webp", []),  # two could be meant
        ("cafe\u0301.png", ["caf\u00e9.png"]),
        ("sub\\e.png", ["sub/e.png"]),
        ("e.png", []),
        ("train/a.png", ["a.png"]),
        ("data/train/a.png", ["a.png"]),
        ("test/a.png", []),  # another folder
        ("/data/Train/sub/e.png", ["sub/e.png"]),
        ("/home/me/set/a.png", ["a.png"]),
        ("/home/me/sub/e.png", ["sub/e.png"]),
        ("/home/me/e.png", []),
        ("C:\\me\\other\\e.png", ["other/e.png"]),
        ("https://host/images/a.png?size=2", ["a.png"]),
        ("gone.png", []),
        ("", []),
        ("/", []),
    ],
)
def test_an_entry_names_its_image_or_none(entry, images):
    assert find(entry) == images


def test_the_last_part_counts_only_if_no_other_image_has_it():
    names = ImageNames(NAMES, folder=Path("/data"))
    assert names.find_by_last_part("images/a.png") == ["a.png"]
    assert names.find_by_last_part("images/e.png") == []


@given(st.text(max_size=30))
def test_any_text_names_images_of_the_folder_or_none(entry):
    assert set(find(entry)) <= set(NAMES)
