"""Where captions come from, and what the pipeline does to them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import caption_files, captions
from trainer.data.caption_files import decode, match_names, read_metadata, read_sidecar
from trainer.data.captions import Caption, apply_pipeline, clean, compose_caption, dropped
from trainer.spec.errors import DataError
from trainer.spec.plan import Source, Subset

SOURCE = Source("folder", "pictures")


def subset(**keys) -> Subset:
    return Subset(SOURCE, **keys)


def outcomes(caption: str | None, **keys) -> set[str]:
    """All that 200 draws of the pipeline make of a caption."""
    return {apply_pipeline(caption, subset(**keys), rng=random.Random(i), epoch=0) for i in range(200)}


# ---- text files


@pytest.mark.parametrize(
    ("data", "text", "legacy"),
    [
        ("café".encode(), "café", False),
        (b"\xef\xbb\xbfa cat", "a cat", False),
        ("a cat, 猫".encode("utf-16"), "a cat, 猫", False),
        ("café".encode("latin-1"), "café", True),
        (b"it\x92s a cat", "it’s a cat", True),
        (b"\x81\x8d", "\x81\x8d", True),
    ],
)
def test_encodings(data, text, legacy):
    assert decode(data) == (text, legacy)


def test_lines_are_stripped_and_empty_ones_left_out():
    assert clean("  a cat \r\n\r\n \t\r\n a dog\n") == "a cat\na dog"
    assert clean(" \n\t ") == ""
    assert clean("a \ud800 cat") == "a ? cat"
    assert clean("one\x85two\u2028three") == "one\x85two\u2028three"


def test_a_sidecar_of_10_kb_is_read_whole(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("word " * 2000, encoding="utf-8")
    assert len(read_sidecar(file).text) == 9999


def test_a_sidecar_above_1_mib_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"x" * (caption_files.MAX_SIDECAR_BYTES + 1))
    with pytest.raises(DataError, match=r"a\.txt is more than 1 MiB"):
        read_sidecar(file)


def test_the_extension_asked_for_comes_first():
    assert caption_files.sidecar_names("a", ".tags") == ("a.tags", "a.txt", "a.caption")
    assert caption_files.sidecar_names("a", "txt") == ("a.txt", "a.caption")


# ---- metadata files


def metadata(tmp_path: Path, name: str, content, **keys) -> dict[str, str]:
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return {k: v.text for k, v in read_metadata(file, subset(**keys)).items()}


def test_json_of_captions_and_tags(tmp_path):
    content = {"a.png": {"caption": "a cat", "tags": "x, y"}, "b.png": {"tags": "z"}, "c.png": "a dog", "d.png": {}}
    assert metadata(tmp_path, "m.json", content) == {"a.png": "a cat,x, y", "b.png": "z", "c.png": "a dog"}


def test_with_wildcards_every_line_gets_the_tags(tmp_path):
    content = {"a.png": {"caption": "a cat\na dog", "tags": "x"}}
    assert metadata(tmp_path, "m.json", content, enable_wildcard=True) == {"a.png": "a cat,x\na dog,x"}


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv"])
def test_rows_of_file_name_and_text(tmp_path, name):
    rows = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "text": "a dog, big"}]
    content = {
        "m.jsonl": "\n".join(json.dumps(r) for r in rows) + "\n",
        "m.json": json.dumps(rows),
        "m.csv": '\ufefffile_name,text\r\na.png,a cat\r\nb.png,"a dog, big"\r\n',
    }[name]
    assert metadata(tmp_path, name, content) == {"a.png": "a cat", "b.png": "a dog, big"}


def test_named_columns_lists_and_repeated_rows(tmp_path):
    source = Source("hub", "x/y", image_column="img", caption_column="blip")
    file = tmp_path / "m.jsonl"
    rows = [{"img": "a.png", "blip": ["one", "two"], "text": "no"}, {"img": "a.png", "blip": "three"}]
    file.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    assert read_metadata(file, Subset(source))["a.png"].text == "one\ntwo\nthree"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", '{"file_name": "a.png", "text": "a"}\n{oops', r"m\.jsonl, line 2: not JSON"),
        ("m.jsonl", '{"text": "a"}', r"m\.jsonl, line 1: no file_name or image_path"),
        ("m.jsonl", '{"file_name": "a.png", "text": 7}', r"line 1: the caption is 7, not a text"),
        ("m.json", "[1]", r"entry 1: not an object"),
        ("m.csv", "name,text\na.png,x\n", r"m\.csv, row 2: no file_name or image_path"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        metadata(tmp_path, name, content)


def test_a_missing_metadata_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"metadata_file .*gone\.json cannot be read"):
        read_metadata(tmp_path / "gone.json", subset())


def test_entries_match_names_stems_and_paths_of_other_machines():
    entries = {
        name: Caption(name, "metadata")
        for name in ("a.png", "./b.png", "c", "/home/me/d.png", "/data/sub/e.png", "C:\\me\\f.png", "gone.png")
    }
    names = ["a.png", "b.png", "c.jpg", "c.png", "d.png", "sub/e.png", "f.png"]
    matched, unknown = match_names(entries, names, folder=Path("/data"))
    assert set(matched) == set(names) and unknown == ["gone.png"]
    assert matched["c.jpg"].text == matched["c.png"].text == "c"


# ---- the pipeline


def test_nothing_asked_for_changes_nothing():
    assert outcomes("a cat , sitting,, {x|y} {{z}}") == {"a cat , sitting,, {x|y} {{z}}"}
    assert outcomes(None) == {""}


def test_prefix_and_suffix():
    assert outcomes("a cat", caption_prefix="photo of", caption_suffix=", film") == {"photo of a cat , film"}
    assert outcomes(None, caption_prefix="photo") == {"photo"}


def test_only_the_first_line_counts_or_a_random_one_with_wildcards():
    assert outcomes("one\ntwo", caption_suffix="end") == {"one end"}
    assert outcomes("one\ntwo", caption_suffix="end", enable_wildcard=True) == {"one end", "two end"}


def test_wildcards():
    assert outcomes("a {red|blue} {cat|dog}", enable_wildcard=True) == {
        "a red cat",
        "a red dog",
        "a blue cat",
        "a blue dog",
    }
    assert outcomes("a {{red|blue}} {cat}", enable_wildcard=True) == {"a {red|blue} cat"}


def test_tags_are_shuffled_but_the_first_are_kept():
    got = outcomes("a, b, c", shuffle_caption=True, keep_tokens=1)
    assert got == {"a, b, c", "a, c, b"}


def test_tokens_around_the_separator_are_kept():
    got = outcomes("a, b ||| c, d ||| e", shuffle_caption=True, keep_tokens_separator="|||")
    assert got == {"a, b, c, d, e", "a, b, d, c, e"}


def test_tags_are_dropped_one_by_one_but_kept_ones_never():
    got = outcomes("a, b, c", caption_tag_dropout_rate=0.5, keep_tokens=1)
    assert got == {"a", "a, b", "a, c", "a, b, c"}


def test_the_secondary_separator_holds_tags_together():
    got = outcomes("a;;b, c", shuffle_caption=True, secondary_separator=";;", caption_separator=",")
    assert got == {"a,b, c", "c, a,b"}


def test_the_trigger_word_is_put_in_front_if_it_is_not_there():
    assert outcomes("a cat", trigger_word="sks") == {"sks, a cat"}
    assert outcomes("a sks cat", trigger_word="sks") == {"a sks cat"}
    assert outcomes("he asks", trigger_word="sks") == {"sks, he asks"}
    assert outcomes(None, trigger_word="sks") == {"sks"}
    assert outcomes("a cat", trigger_word="sks", is_reg=True) == {"a cat"}
    assert all(c.count("sks") == 1 for c in outcomes("sks, a, b", trigger_word="sks", caption_tag_dropout_rate=0.9))


def test_whole_captions_are_dropped_at_the_higher_rate():
    for keys, rate in (({"caption_dropout_rate": 0.3}, 0.1), ({"caption_dropout_rate": 0.1}, 0.3)):
        rng = random.Random(0)
        got = [
            apply_pipeline("a", subset(**keys, trigger_word="sks"), rng=rng, epoch=0, dropout_rate=rate)
            for _ in range(4000)
        ]
        assert set(got) == {"", "sks, a"}
        assert abs(got.count("") / 4000 - 0.3) < 0.03


def test_every_third_epoch_goes_without_captions():
    rng = random.Random(0)
    got = [dropped(subset(caption_dropout_every_n_epochs=3), rng=rng, epoch=e) for e in range(7)]
    assert got == [False, False, True, False, False, True, False]


TAG = st.text(st.characters(categories=("L", "N", "Zs")), min_size=1, max_size=8).filter(str.strip)


@given(st.lists(TAG, max_size=8), st.integers(0, 9), st.booleans(), st.sampled_from([0.0, 0.5]), st.integers())
def test_kept_tags_stay_in_place_and_nothing_is_invented(tags, keep, shuffle, rate, seed):
    keys = {"keep_tokens": keep, "shuffle_caption": shuffle, "caption_tag_dropout_rate": rate}
    got = compose_caption(", ".join(tags), subset(**keys), random.Random(seed))
    stripped = [t.strip() for t in tags]
    parts = [t.strip() for t in got.split(",")] if got else []
    assert parts[: min(keep, len(tags))] == stripped[:keep]
    left = list(stripped)
    for part in parts:
        left.remove(part)  # each tag at most as often as it was there
    if rate == 0:
        assert not left
    if not shuffle:
        rest = iter(stripped)
        assert all(part in rest for part in parts)  # in the old order


@given(st.text(), st.integers())
def test_the_same_generator_gives_the_same_text(caption, seed):
    keys = {"enable_wildcard": True, "shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "trigger_word": "sks"}
    first, second = (compose_caption(clean(caption), subset(**keys), random.Random(seed)) for _ in range(2))
    assert first == second and "sks" in first


@given(st.text())
def test_any_text_without_options_is_its_first_line(text):
    assert compose_caption(clean(text), subset(), random.Random(0)) == clean(text).split("\n")[0]


def test_tag_frequency():
    assert captions.tag_frequency(["a, b", "a,\nc", None], ",") == {"a": 2, "b": 1}
