"""A dataset's fingerprint: each field of an image's record changes it, or is known not to matter."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from trainer.data import identity
from trainer.data.identity import content_changes, fingerprint, fingerprint_differences
from trainer.data.records import ImageRecord
from trainer.spec.rules.resume_rules import Changes
from trainer.storage.run_records import Run

IMAGE = ImageRecord(
    "a.png", Path("/pictures/a.png"), "1" * 64, 64, 48, 0, 0, "a cat", mask_file=Path("/masks/a.png"),
    mask_sha256="2" * 64, part_of=3, convention="4 times",
)  # fmt: skip
# Fields of a record → why a change of them is no other dataset.
WITHOUT_EFFECT = {
    "file": "where the bytes are on this machine",
    "width": "follows from the bytes",
    "height": "follows from the bytes",
    "span": "where the bytes are in the file",
    "subset": "`part_of` has the subset that the plan asks for",
    "has_alpha": "follows from the bytes",
    "mask_file": "the mask's bytes are in the fingerprint",
    "caption_file": "where the caption was read",
    "captioned_by": "who made the caption; the caption is in the fingerprint",
    "caption_encoding": "how the caption was read; the caption is in the fingerprint",
}


def other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return Path(f"{value}x") if isinstance(value, Path) else f"{value}x"


def test_every_field_of_a_record_gives_another_fingerprint_or_is_known_to_be_without_effect():
    unchanged = set()
    for field in dataclasses.fields(ImageRecord):
        changed = dataclasses.replace(IMAGE, **{field.name: other(getattr(IMAGE, field.name))})
        if fingerprint([changed]) == fingerprint([IMAGE]):
            unchanged.add(field.name)
    assert unchanged == WITHOUT_EFFECT.keys()


def test_what_is_missing_is_not_what_is_empty():
    variants = [
        dataclasses.replace(IMAGE, **values)
        for values in (
            {"caption": None}, {"caption": ""}, {"caption": "-"}, {"mask_sha256": None}, {"mask_sha256": "alpha"},
            {"convention": None}, {"convention": ""}, {"part_of": None}, {"part_of": None, "subset": 1}, {},
        )
    ]  # fmt: skip
    prints = [str(fingerprint([image])) for image in variants]
    assert len(set(prints)) == len(prints)


def test_the_form_on_disk_is_the_one_of_every_version():
    """States hold it: image, mask, caption and, only where a folder's name says it, the repeats."""
    found = fingerprint([IMAGE])
    assert list(found) == ["0.3/a.png"]
    assert found["0.3/a.png"] == f"{'1' * 64} {'2' * 64} {hashlib.sha256(b'a cat').hexdigest()} 4 times"
    plain = ImageRecord("b.png", Path("b.png"), "5" * 64, 1, 1, 1, 2, None)
    assert fingerprint([plain, IMAGE]) == {"1.2/b.png": f"{'5' * 64} - -", **found}


PRINT = "image mask caption"


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"0.0/a": PRINT}, {"0.0/a": PRINT}, []),
        ({"0.0/a": PRINT}, {"0.0/a": "other mask caption"}, ["changed: 0.0/a (image)"]),
        ({"0.0/a": PRINT}, {"0.0/a": "image other caption"}, ["changed: 0.0/a (mask)"]),
        ({"0.0/a": PRINT}, {"0.0/a": "image mask other"}, ["changed: 0.0/a (caption)"]),
        ({"0.0/a": PRINT}, {"0.0/a": "x y z"}, ["changed: 0.0/a (image, mask, caption)"]),
        ({"0.0/a": PRINT}, {"0.0/a": f"{PRINT} 4"}, ["changed: 0.0/a (repeats in its folder's name)"]),
        ({"0.0/a": PRINT}, {}, ["removed: 0.0/a"]),
        ({}, {"0.0/a": PRINT}, ["added: 0.0/a"]),
        ({"0.0/a": PRINT}, {"0.0/b": PRINT}, ["renamed: 0.0/a → 0.0/b"]),
        ({"a": "1", "b": "1"}, {"c": "1", "d": "1"}, ["renamed: a → c", "renamed: b → d"]),
        ({"a": "1", "b": "1"}, {"c": "1"}, ["renamed: a → c", "removed: b"]),
        ({"a": "1"}, {"c": "1", "d": "1"}, ["renamed: a → c", "added: d"]),
        ({"a": "1", "b": "2"}, {"b": "2", "c": "3"}, ["removed: a", "added: c"]),
        ({"a": "1"}, {"a": "1", "b": "1"}, ["added: b"]),  # a copy is no renamed one
    ],
)
def test_each_difference_has_its_line(old, new, lines):
    assert fingerprint_differences(old, new) == lines


def test_ten_lines_and_a_count_of_the_rest():
    new = {f"{i:02}": "1" for i in range(12)}
    lines = fingerprint_differences({}, new)
    assert lines == [*(f"added: {i:02}" for i in range(10)), "and 2 more"]
    ten = dict(list(new.items())[:10])
    assert fingerprint_differences({}, ten) == lines[:10]
    assert fingerprint_differences({}, new, limit=1) == ["added: 00", "and 11 more"]


def run(tmp_path, record):
    return Run(tmp_path, "", "x", "x", {}, None, record, step=0, done=False)


@pytest.mark.parametrize("places", [(), ("DATASET_NAME: a → b",)])
def test_places_are_told_only_with_images_that_differ(tmp_path, places):
    asks = content_changes({"a": "2"}, "weights")
    found = Changes(places=places)
    assert asks(run(tmp_path, {"data": {"a": "1"}, "model": "weights"}), found) == [*places, "changed: a (image)"]
    assert asks(run(tmp_path, {"data": {"a": "2"}, "model": "weights"}), found) == []
    assert asks(run(tmp_path, {}), found) == []  # not known
    assert asks(run(tmp_path, {"data": {"a": 1}}), found) == []  # of a foreign hand
    assert asks(run(tmp_path, {"data": ["a"]}), found) == []


def test_weights_elsewhere_are_compared_where_they_are_at_hand(tmp_path):
    found = Changes(model=("MODEL_PATH: a → b",))
    record = {"data": {}, "model": "weights"}
    assert content_changes({}, "others")(run(tmp_path, record), found) == ["MODEL_PATH: a → b"]
    assert content_changes({}, "weights")(run(tmp_path, record), found) == []
    assert content_changes({}, None)(run(tmp_path, record), found) == []
    assert content_changes({}, "others")(run(tmp_path, record), Changes()) == []


def many(count: int, *, caption: str = "x") -> list[ImageRecord]:
    return [dataclasses.replace(IMAGE, name=f"{i}.png", sha256=f"{i:064x}", caption=caption) for i in range(count)]


def test_more_images_than_are_named_are_counted_and_summed(monkeypatch):
    full = fingerprint(many(9))
    monkeypatch.setattr(identity, "MOST_NAMED", 8)
    assert fingerprint(many(8)) == dict(list(full.items())[:8])
    grouped = fingerprint(many(9))
    assert grouped["images"] == "9" and len(grouped) == identity.GROUPS + 1
    assert fingerprint(many(9)[::-1]) == grouped  # whatever the order
    # A run that began before, with each by its name, goes on; and so does one that grows smaller than that.
    assert fingerprint_differences(full, grouped) == fingerprint_differences(grouped, full) == []
    changed = [*many(8), dataclasses.replace(many(9)[8], caption="other")]
    for other, count in ((fingerprint(changed), 1), (fingerprint(many(12)), 3), (fingerprint(many(7)), 2)):
        (line,) = fingerprint_differences(full, other) if "images" in other else fingerprint_differences(grouped, other)
        assert f"9 images before, {12 if count == 3 else 7 if count == 2 else 9} now; {count} of 1024" in line
