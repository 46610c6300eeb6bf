"""Which caption each image of a folder gets, and that nothing else in the folder is left unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.caption_files.find import MAX_SIDECAR_BYTES, FoundCaptions, find_captions
from trainer.data.folder_listing import list_folder
from trainer.spec.plan import Source, Subset


def find(folder: Path, files: dict[str, str | bytes], **keys: Any) -> FoundCaptions:
    """The captions in a folder of these files. Images are found by name: no one opens them here."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    named = {key: keys.pop(key) for key in ("image_column", "caption_column") if key in keys}
    subset = Subset(Source("folder", folder.name, path=str(folder), **named), **keys)
    return find_captions(list_folder(subset), subset)


def texts(found: FoundCaptions) -> dict[str, str]:
    return {name: caption.text for name, caption in found.captions.items()}


def notes(found: FoundCaptions) -> str:
    return "\n".join(found.findings.notes)


def rows(*pairs: tuple[str, str]) -> str:
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in pairs)


def test_metadata_comes_before_sidecars_and_both_texts_are_named(tmp_path):
    found = find(tmp_path, {"a.png": "", "a.txt": "sidecar", "metadata.jsonl": rows(("a.png", "row"))})
    assert texts(found) == {"a.png": "row"}
    assert found.captions["a.png"].file == "metadata.jsonl, line 1"
    assert "metadata.jsonl: another caption elsewhere for 1 image; the row is used: a.png (not a.txt)" in notes(found)
    assert found.findings.unused == ["a.txt: metadata.jsonl, line 1 has the caption of a.png"]


def test_two_metadata_files_for_one_image(tmp_path):
    files = {"a.png": "", "metadata.csv": "file_name,text\na.png,one\n", "Metadata.JSONL": rows(("a.png", "two"))}
    found = find(tmp_path, files)
    assert texts(found) == {"a.png": "one"} and "a.png (not Metadata.JSONL, line 1)" in notes(found)


def test_rows_that_match_nothing_are_a_warning_with_both_sides(tmp_path):
    found = find(tmp_path, {"a.png": "", "metadata.jsonl": rows(("b.png", "x"))}, trigger_word="zot")
    assert notes(found) == (
        "WARNING: metadata.jsonl: no row names an image in the folder: line 1 (b.png). An image without a row is a.png."
    )
    assert found.findings.unused == ["metadata.jsonl, line 1 (b.png): there is no such image"]


def test_some_rows_without_an_image_are_named(tmp_path):
    files = {"a.png": "", "b.heic": "", "metadata.jsonl": rows(("a.png", "x"), ("gone.png", "y"), ("b.heic", "z"))}
    found = find(tmp_path, files)
    assert "no image in the folder for 1 of its 3 rows: line 2 (gone.png)" in notes(found)
    assert found.findings.unused == [
        "metadata.jsonl, line 2 (gone.png): there is no such image",
        "metadata.jsonl, line 3 (b.heic): its image is skipped",
    ]


def test_names_with_the_folder_in_front(tmp_path):
    files = {"train/a.png": "", "train/metadata.jsonl": rows(("train/a.png", "x"))}
    assert texts(find(tmp_path, files)) == {"train/a.png": "x"}


def test_if_no_row_matches_the_last_part_of_the_name_may_do(tmp_path):
    found = find(tmp_path, {"flat/a.png": "", "metadata.jsonl": rows(("images/a.png", "x"))})
    assert texts(found) == {"flat/a.png": "x"}
    assert "matched by the last part of the name alone: images/a.png is flat/a.png" in notes(found)


def test_of_several_rows_the_first_wins_and_it_is_said(tmp_path):
    files = {"a.png": "", "metadata.jsonl": rows(("a.png", "one"), ("./a.png", "two"))}
    found = find(tmp_path, files)
    assert texts(found) == {"a.png": "one\ntwo"}
    assert "several rows for 1 image: the first is used (enable_wildcard draws one): a.png (line 1, line 2)" in notes(
        found
    )
    assert notes(find(tmp_path, files, enable_wildcard=True)) == ""


def test_a_column_is_asked_for_and_there_is_no_metadata_file(tmp_path):
    found = find(tmp_path, {"a.png": "", "a.txt": "x"}, caption_column="foo")
    assert "CAPTION_COLUMN=foo chooses nothing: there is no metadata file" in notes(found)


def test_the_metadata_file_asked_for_is_the_only_one(tmp_path):
    files = {"a.png": "", "metadata.csv": "file_name,text\na.png,not this\n", "mine.json": '{"a": "this"}'}
    found = find(tmp_path, files, metadata_file="mine.json")
    assert texts(found) == {"a.png": "this"}
    assert found.findings.unused == ["metadata.csv: metadata_file mine.json is read instead"]
    found = find(tmp_path, {}, metadata_file="gone.json")
    assert found.findings.problems == ["metadata_file gone.json cannot be read: No such file or directory."]


def test_a_table_with_another_name_is_a_warning_if_captions_are_missing(tmp_path):
    found = find(tmp_path, {"a.png": "", "captions.csv": "file_name,text\na.png,x\n"}, class_tokens="cat")
    assert (
        "no caption for 1 image, and captions.csv is not read. If the captions are there, call it metadata.csv, "
        in notes(found)
    )
    assert found.findings.unused == ["captions.csv: it is neither an image nor a caption"]


def test_text_files_without_an_image_are_a_warning_with_both_sides(tmp_path):
    found = find(tmp_path, {"a.b.png": "", "a.txt": "x", "notes.txt": ""}, trigger_word="zot")
    assert notes(found) == "WARNING: no image for 1 text file: a.txt. An image without a text file is a.b.png."
    assert "a.txt: there is no image of this name" in found.findings.unused
    assert "notes.txt: it is neither an image nor a caption" in found.findings.unused


def test_captions_of_other_tools_are_named(tmp_path):
    found = find(tmp_path, {"a.png": "", "a.tags": "x", "b.png": "", "b.txt": "y", "b.json": "{}"})
    assert "not read, though 1 image without a caption would need it: a.tags for a.png" in (notes(found))
    assert "b.json: its extension is not the caption_extension" in found.findings.unused


def test_two_text_files_for_one_image(tmp_path):
    found = find(tmp_path, {"a.png": "", "a.txt": "one", "a.caption": "two"}, caption_extension=".txt")
    assert texts(found) == {"a.png": "one"} and "a.txt (not a.caption)" in notes(found)


def test_an_older_encoding_is_named_with_the_file(tmp_path):
    found = find(tmp_path, {"a.png": "", "a.txt": "赤い円、白い背景".encode("cp932"), "b.png": "", "b.txt": "x"})
    assert texts(found) == {"a.png": "赤い円、白い背景", "b.png": "x"}
    assert "not UTF-8, so read as cp932: 1 file: a.txt (赤い円、白い背景)" in notes(found)
    assert found.captions["a.png"].encoding == "cp932"


def test_a_caption_of_10_kb_is_read_whole(tmp_path):
    assert len(texts(find(tmp_path, {"a.png": "", "a.txt": "word " * 2000}))["a.png"]) == 9999


def test_controls_are_taken_out_and_the_file_is_named(tmp_path):
    found = find(tmp_path, {"a.png": "", "a.txt": "a\0 cat sits on the m\ufffdt \u200b"})
    assert texts(found) == {"a.png": "a  cat sits on the m t"}
    assert "1 caption: a.txt (U+0000, U+200B, U+FFFD)" in notes(found)


def test_invisible_characters_alone_refuse_nothing(tmp_path):
    assert texts(find(tmp_path, {"a.png": "", "a.txt": "a\u200bb\u202ec\ufeff\u00ad"})) == {"a.png": "abc"}


def test_of_a_table_in_an_older_encoding_a_caption_is_shown(tmp_path):
    table = "file_name,text\na.png,赤い円、白い背景\n".encode("cp932")
    assert "metadata.csv (a.png,赤い円、白い背景)" in notes(find(tmp_path, {"a.png": "", "metadata.csv": table}))


def test_letters_that_were_spoilt_before_are_named(tmp_path):
    assert "UTF-8 that was once read as Windows-1252 and saved so: 1 file" in notes(
        find(tmp_path, {"a.png": "", "a.txt": "cafÃ©"})
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "neither Unicode nor another known encoding"),
        ("\x01\x02\x03\x04\x05a", "its characters are not those of text"),
        ("{\\rtf1 a cat}", "it is RTF: save it as plain text"),
        ("<!DOCTYPE html><p>404", "it is a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
        (b"x" * (MAX_SIDECAR_BYTES + 1), "more than 1 MiB: not a caption"),
    ],
)
def test_a_file_that_is_no_caption_refuses_the_dataset(tmp_path, content, reason):
    found = find(tmp_path, {"a.png": "", "a.txt": content})
    assert reason in "\n".join(found.findings.problems) and "a.txt" in "\n".join(found.findings.problems)
