"""Which text file belongs to which image."""

from __future__ import annotations

from trainer.data.caption_files.sidecars import Sidecars, extensions, find_sidecars


def find(images: str, others: str, *, skipped: str = "", extension: str = ".caption") -> Sidecars:
    return find_sidecars(images.split(), skipped.split(), others.split(), extension=extension)


def test_the_extension_asked_for_comes_first():
    assert extensions(".tags") == (".tags", ".txt", ".caption")
    assert extensions("txt") == (".txt", ".caption")
    found = find("a.png b.png c.png", "a.tags a.txt a.caption b.txt b.caption c.caption", extension=".tags")
    assert found.of_image == {"a.png": "a.tags", "b.png": "b.txt", "c.png": "c.caption"}
    assert found.passed_over == {"a.txt": "a.tags", "a.caption": "a.tags", "b.caption": "b.txt"}


def test_an_extension_may_have_two_dots():
    assert find("a.png", "a.wd14.txt a.txt", extension=".wd14.txt").of_image == {"a.png": "a.wd14.txt"}


def test_a_name_may_keep_the_suffix_of_the_image():
    assert find("a.png b.png", "a.png.txt b.png.caption").of_image == {"a.png": "a.png.txt", "b.png": "b.png.caption"}
    assert find("a.b.png", "a.b.txt").of_image == {"a.b.png": "a.b.txt"}


def test_case_and_the_accents_of_macos_do_not_matter():
    assert find("A.PNG", "a.TXT").of_image == {"A.PNG": "a.TXT"}
    assert find("caf\u00e9.png", "cafe\u0301.txt").of_image == {"caf\u00e9.png": "cafe\u0301.txt"}
    assert find("A.png a.png", "A.txt a.txt").of_image == {"A.png": "A.txt", "a.png": "a.txt"}


def test_two_images_of_one_stem_share_a_caption():
    assert find("a.jpg a.png", "a.txt").of_image == {"a.jpg": "a.txt", "a.png": "a.txt"}


def test_what_no_image_takes_is_known_by_name():
    found = find("a.b.png c.png", "a.txt d/c.txt README.txt c.tags c.json b.txt", skipped="b.heic")
    assert found.orphans == ["a.txt", "d/c.txt"]
    assert found.other_tools == {"c.tags": "c.png", "c.json": "c.png"}
    assert found.of_skipped == {"b.txt": "b.heic"}
