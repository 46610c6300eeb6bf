"""The rows of metadata files: columns, delimiters, and rows that mean two things."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.caption_files.findings import Findings
from trainer.data.caption_files.tables import read_table
from trainer.spec.plan import Source, Subset

COLUMNS = ("image_column", "caption_column")


def read(title: str, content: Any, **keys: Any) -> tuple[dict[str, str | None], Findings]:
    """The captions of a file by the name in its rows, and what is said about it."""
    named = {key: keys.pop(key) for key in COLUMNS if key in keys}
    subset = Subset(Source(keys.pop("kind", "folder"), "pictures", **named), **keys)
    findings = Findings()
    text = content if isinstance(content, str) else json.dumps(content)
    return {row.name: row.caption for row in read_table(title, text, subset, findings)}, findings


def captions(title: str, content: Any, **keys: Any) -> dict[str, str | None]:
    rows, findings = read(title, content, **keys)
    assert findings.problems == []
    return rows


def problem(title: str, content: Any, **keys: Any) -> str:
    _, findings = read(title, content, **keys)
    return "\n".join(findings.problems)


# ---- shapes of JSON


def test_json_of_captions_and_tags():
    content = {"a.png": {"caption": "a cat", "tags": "x, y"}, "b.png": {"tags": "z"}, "c.png": "a dog", "d.png": {}}
    assert captions("m.json", content) == {"a.png": "a cat,x, y", "b.png": "z", "c.png": "a dog", "d.png": None}


def test_with_wildcards_every_line_gets_the_tags():
    content = {"a.png": {"caption": "a cat\na dog", "tags": "x"}}
    assert captions("m.json", content, enable_wildcard=True) == {"a.png": "a cat,x\na dog,x"}


ROWS = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "text": "a dog, big"}]


@pytest.mark.parametrize("title", ["m.jsonl", "m.json"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "\n".join(json.dumps(row) for row in ROWS) + "\n",
        "\r\n".join(json.dumps(row) for row in ROWS),
        json.dumps({"version": 2, "images": ROWS}),
        json.dumps({row["file_name"]: row["text"] for row in ROWS}),
    ],
)
def test_either_form_of_json_in_a_file_of_either_name(title, content):
    assert captions(title, content) == {"a.png": "a cat", "b.png": "a dog, big"}


@pytest.mark.parametrize("title", ["m.jsonl", "m.json"])
def test_a_single_row(title):
    assert captions(title, {"image": "a.png", "prompt": "a cat"}) == {"a.png": "a cat"}


def test_names_that_are_numbers_or_images_of_the_hub_and_commas_after_lines():
    content = '{"image": {"path": "a.png"}, "text": "x"},\n{"image": 7, "text": "y"},\n'
    assert captions("m.jsonl", content) == {"a.png": "x", "7": "y"}


def test_keys_of_a_json_file_that_are_no_rows_are_named():
    _, findings = read("m.json", {"version": 3, "a.png": "a cat"})
    assert findings.unused == ["m.json, key 'version': it is not a caption"]


# ---- columns


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("file_name,text", "a.png,a cat"),
        ("image, caption", "a.png, a cat"),
        ("\ufeffFile Name;Prompt", "a.png;a cat"),
        ("filename\tdescription", "a.png\ta cat"),
        ("img|captions", "a.png|a cat"),
        ('"path","tags"', '"a.png","a cat"'),
        ("Image_Path,blip_caption", "a.png,a cat"),
        ("key,label", "a.png,a cat"),
        ("sep=;\nfile;text", "a.png;a cat"),
        ("width,text,file", "64,a cat,a.png"),
        ("file_name,text,,", "a.png,a cat,,"),
    ],
)
@pytest.mark.parametrize("title", ["metadata.csv", "metadata.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_columns_and_delimiters_of_many_tools(title, header, row, end):
    assert captions(title, f"{header}\n{row}\n\n".replace("\n", end)) == {"a.png": "a cat"}


def test_the_columns_that_are_asked_for():
    content = "name;scene;caption\na.png;a cat;no\n"
    assert captions("m.csv", content, image_column="name", caption_column="scene") == {"a.png": "a cat"}
    assert captions("m.csv", content, caption_column="Scene ") == {"a.png": "a cat"}
    rows = [{"img": "a.png", "blip": ["one", "two"], "text": "no", "tags": "no"}]
    assert captions("m.jsonl", rows, image_column="img", caption_column="blip") == {"a.png": "one\ntwo"}


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    content = "image, caption\na.png,a cat\n"
    assert problem("m.csv", content, caption_column="foo") == (
        "CAPTION_COLUMN=foo: m.csv has no such column, only image, caption."
    )
    assert "IMAGE_COLUMN=bar: m.csv has no such column" in problem("m.csv", content, image_column="bar")
    assert captions("m.csv", content, caption_column="foo", kind="hub") == {"a.png": "a cat"}  # chosen there already


def test_no_column_of_names_is_refused_with_the_variables_that_choose_one():
    assert problem("m.csv", "what,ever\na.png,x\n") == (
        "m.csv: no column has the names of the images; the columns are 'what', 'ever'. Choose with IMAGE_COLUMN and "
        "CAPTION_COLUMN, or rename them to file_name and caption."
    )
    assert "Its first line must name the columns" in problem("m.csv", "a.png,a cat\nb.png,a dog\n")


def test_no_column_of_captions_is_a_warning_with_the_columns():
    rows, findings = read("m.csv", "file_name,width\na.png,64\n")
    assert rows == {"a.png": None}
    assert "no column has captions; the columns are 'file_name', 'width'" in findings.notes[-1]
    assert "CAPTION_COLUMN" in findings.notes[-1]


def test_columns_without_use_are_named_and_a_second_caption_is_a_warning():
    _, findings = read("m.csv", "file_name,text,width\na.png,a cat,64\n")
    assert findings.notes == ["m.csv: columns without use: width"]
    assert findings.unused == ["m.csv, column 'width': it is not read"]
    _, findings = read("m.csv", "file_name,caption,text,long_caption\na.png,a cat,another,x\n")
    assert findings.notes == [
        "WARNING: m.csv: the captions are in 'caption'; not read: text, long_caption. CAPTION_COLUMN chooses another."
    ]


def test_two_columns_of_one_name_or_of_captions_are_refused():
    assert "two columns have the name 'text'" in problem("m.csv", "file_name,text,Text\na.png,x,y\n")
    message = problem("m.csv", "file_name,caption_a,caption_b\na.png,x,y\n")
    assert message == "m.csv has several columns of captions. Choose CAPTION_COLUMN: caption_a, caption_b."


# ---- rows


def test_a_caption_with_commas_and_without_quotes_is_whole_and_said():
    rows, findings = read("m.csv", 'file_name,text\na.png,a dragon, flying, red\nb.png,"a, b"\nc.png,x\n')
    assert rows == {"a.png": "a dragon, flying, red", "b.png": "a, b", "c.png": "x"}
    assert findings.notes == [
        "WARNING: m.csv: ',' without double quotes in the caption of 1 row: the whole text is used: row 2."
    ]


@pytest.mark.parametrize(
    "content",
    [
        "file_name,width,text\nb.png,1,x\na.png,64,a dragon, flying\n",
        "text,file_name\nx,b.png\na dragon, flying,a.png\n",
        'file_name,text\nb.png,x\na.png,"a dragon", flying\n',
    ],
)
def test_too_many_fields_that_may_mean_two_things_are_refused_with_the_row(content):
    assert "m.csv, row 3: it has" in problem("m.csv", content)
    assert "between double quotes" in problem("m.csv", content)


def test_the_fields_that_a_spreadsheet_adds_do_not_count():
    content = "file_name,text,,\na.png,a cat,,\n,,,\nb.png,a dog, big,\n"
    assert captions("m.csv", content) == {"a.png": "a cat", "b.png": "a dog, big"}


def test_too_few_fields_and_empty_captions_are_named():
    rows, findings = read("m.csv", "file_name,text\na.png\nb.png,\nc.png,x\n")
    assert rows == {"a.png": None, "b.png": "", "c.png": "x"}
    assert "fewer fields than the header's 2 in 1 row: row 2." in findings.notes[0]
    assert "no caption in 1 row: row 2 (a.png)." in findings.notes[1]
    assert findings.unused == ["m.csv, row 2 (a.png): it has no caption"]


@pytest.mark.parametrize(
    ("title", "content", "message"),
    [
        ("m.jsonl", '{"file_name": "a.png", "text": "a"}\n{oops', "m.jsonl, line 2: not JSON"),
        ("m.jsonl", '{"text": "a"}\n{"file_name": "b", "text": "a"}', "m.jsonl, line 1: no file_name"),
        ("m.jsonl", '{"file_name": "a.png", "text": 7}', "m.jsonl, line 1: the caption is 7, not a text"),
        ("m.json", "[1]", "m.json, entry 1: not an object"),
        ("m.json", "[" * 100_000, "m.json: it is nested too deeply"),
        ("m.csv", 'file_name,text\na.png,"x\nb.png,y\n', "m.csv, row 2: not CSV"),
        ("m.csv", "file_name,text\na.png," + "x" * 200_000, "m.csv, row 2: not CSV"),
        ("m.csv", 'file_name,text\na.png,"x"y\n', "m.csv, row 2: not CSV"),
        ("m.csv", "file_name,text\na.png,x\n,y\n", "m.csv, row 3: no file_name"),
        ("m.jsonl", '{"file_name": [7], "text": "a"}\n{"file_name": "b"}', "file_name is [7], not the name of a file"),
        ("m.json", '{"a.png": "one", "a.png": "two"}', "m.json: not JSON: the key 'a.png' is given twice"),
    ],
)
def test_a_bad_row_is_named(title, content, message):
    assert message in problem(title, content)


def test_an_empty_file_is_a_warning():
    for title, content in (("m.csv", ""), ("m.csv", "file_name,text\n"), ("m.jsonl", "\n"), ("m.json", "[]")):
        assert read(title, content)[1].notes == [f"WARNING: {title} has no rows."]


def test_controls_in_rows_are_taken_out_and_the_row_is_named():
    rows, findings = read("m.jsonl", [{"file_name": "a.png", "text": "a\0cat\u200b"}])
    assert rows == {"a.png": "a cat"}
    assert "entry 1 (U+0000, U+200B)" in findings.notes[0]


CELL = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=12).filter(str.strip)


@given(st.lists(CELL, min_size=1, max_size=5), st.sampled_from([",", ";", "\t", "|"]))
def test_a_well_written_table_is_read_as_written(texts, delimiter):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([["file_name", "text"], *([f"{i}.png", text] for i, text in enumerate(texts))])
    found = captions("m.csv", out.getvalue())
    assert list(found) == [f"{i}.png" for i in range(len(texts))]


@given(st.text(max_size=200), st.sampled_from(["m.csv", "m.tsv", "m.json", "m.jsonl"]))
def test_any_text_is_read_or_refused(text, title):
    read(title, text)
