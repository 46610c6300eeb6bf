"""The forms of dataset.json: JSON, JSON5, YAML and TOML give the same values, and mistakes are named with the fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import json5
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from entrypoint.dataset_config.manifest import PACKAGED, read_manifest
from trainer.spec.documents.forms import MAX_TEXT, parse
from trainer.spec.errors import SettingsError

NOWHERE = Path("/nonexistent")
GOOD = '{"datasets": [{"resolution": 512, "subsets": [{"num_repeats": 4}]}]}'
FORMS = {
    "comments.json": '{// mine\n"datasets": [{"resolution": 512, "subsets": [{"num_repeats": 4,},],},], /* end */}',
    "quotes.json": "{'datasets': [{resolution: 512, subsets: [{num_repeats: 4}]}]}",
    "a.jsonc": '{"datasets": [{"resolution": 512, "subsets": [{"num_repeats": 4}]}]} // end',
    "a.yaml": "# mine\ndatasets:\n- resolution: 512\n  subsets:\n  - num_repeats: 4\n",
    "a.yml": "datasets:\n  - resolution: 512\n    subsets: [{num_repeats: 4}]\n",
    "flow.yaml": GOOD,
    "a.toml": "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nnum_repeats = 4\n",
    "toml.json": "[[datasets]]\nresolution = 512\n  [[datasets.subsets]]\n  num_repeats = 4\n",
    "yaml.json": "datasets:\n- resolution: 512\n  subsets:\n  - num_repeats: 4\n",
    "without_suffix": "[general]\n[[datasets]]\nresolution = 512\nsubsets = [{num_repeats = 4}]\n",
}


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refusal(config: str) -> str:
    with pytest.raises(SettingsError) as caught:
        read_manifest(config, None, packaged=NOWHERE)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_dataset(name: str, tmp_path: Path) -> None:
    want = read_manifest(GOOD, None, packaged=NOWHERE).datasets
    assert read_manifest(write(tmp_path, name, FORMS[name]), None, packaged=NOWHERE).datasets == want
    if name != "without_suffix":  # and as the value of the variable itself
        assert read_manifest(FORMS[name], None, packaged=NOWHERE).datasets == want


@pytest.mark.parametrize(
    ("name", "note"), [("comments.json", "read as JSON5"), ("toml.json", "read as TOML"), ("yaml.json", "read as YAML")]
)
def test_another_form_than_the_name_says_is_noted(name: str, note: str, tmp_path: Path) -> None:
    notes = read_manifest(write(tmp_path, name, FORMS[name]), None, packaged=NOWHERE).notes
    assert len(notes) == 1 and note in notes[0] and name in notes[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig"])
@pytest.mark.parametrize("text", [GOOD, FORMS["a.yaml"]])
def test_files_of_windows_editors_are_read(encoding: str, text: str, tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", text.replace("\n", "\r\n").encode(encoding))
    assert read_manifest(path, None, packaged=NOWHERE).datasets[0].resolution == (512, 512)


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20) | st.sampled_from(
    [
        "no",
        "yes",
        "on",
        "null",
        "~",
        "1",
        "1.5",
        "1e3",
        "0x10",
        "010",
        "12:30",
        "2024-01-01",
        "=",
        "*a",
        "&a",
        "<<",
        "{a}",
    ]
)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    TEXTS | NUMBERS | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def toml(value: Any) -> str:
    """A value as TOML writes it inside a line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(inner) for inner in value) + "]"
    return json.dumps(value, ensure_ascii=False)


@given(st.dictionaries(TEXTS, VALUES, max_size=4).filter(bool))
@hypothesis_settings(max_examples=150, deadline=None)
def test_the_same_values_come_out_of_all_forms(tree: dict[str, Any]) -> None:
    lines = "\n".join(f"{toml(key)} = {toml(value)}" for key, value in tree.items())
    written = {
        "json": json.dumps(tree),
        "toml": lines,
        "yaml": yaml.safe_dump(tree, default_style='"', default_flow_style=False)
        if _is_text(tree)
        else json.dumps(tree),
    }
    for form, text in written.items():
        assert parse(text, form) == (tree, None), form
    assert parse(f"// a comment\n{json.dumps(tree)}", "json")[0] == tree
    assert json5.loads(json.dumps(tree, ensure_ascii=False)) == tree


def _is_text(tree: Any) -> bool:
    """Whether a tree has texts alone, which `default_style` puts in quotes; it would put numbers there too."""
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return isinstance(tree, str) or (isinstance(tree, dict | list) and all(_is_text(value) for value in inner))


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "2024-01-01", "12:30:00", "0x10", "1_000", "=", "0o7"])
def test_a_plain_word_of_yaml_is_a_text(word: str) -> None:
    assert parse(f"a: {word}", "yaml")[0] == {"a": word}


@pytest.mark.parametrize(
    ("plain", "value"), [("true", True), ("~", None), ("", None), ("3", 3), ("1.5", 1.5), ("1e-4", 1e-4)]
)
def test_numbers_and_switches_of_yaml_are_what_json_has(plain: str, value: Any) -> None:
    assert parse(f"a: {plain}", "yaml")[0] == {"a": value}


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "a.json",
            '{"datasets": [{"subsets": [{"image_dir": "C:\\Users\\me\\photos"}]}]}',
            r"line 1: .*C:\\Users\\me\\photos",
        ),
        ("a.json", '{\n"image_dir": "C:\\users"}', "line 2: .*write / instead, and mount"),
        (
            "a.toml",
            '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\Users\\me"\n',
            "line 3: .*single quotes, and mount",
        ),
        ("a.toml", '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\new\\thing"\n', "has a line break or a tab"),
        ("a.toml", "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'C:\\Users\\me'\n", "a path of Windows.*mount"),
        ("a.yaml", 'datasets:\n- subsets:\n  - image_dir: "C:\\Users\\me"\n', "line 3: .*write / instead"),
        ("a.yaml", "datasets:\n- subsets:\n  - image_dir: C:\\Users\\me\n", "a path of Windows.*mount"),
        ("a.json", '// x\n{"image_dir": "\\\\server\\share"}', "has backslashes"),
    ],
)
def test_paths_of_windows_are_named_with_the_fix(name: str, content: str, told: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, name, content))
    assert __import__("re").search(told, message), message
    assert message.count("\n") == 1  # one line below the heading


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("datasets: 1\ndatasets: 2", "line 2: the key 'datasets' is given twice"),
        ("a: &x [1]\nb: *x", "line 2: references"),
        ("a: &x [1]\nb: {<<: *x}", "references"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: [", "line 1"),
        ("a:\n\tb: 1", "line 2 begins with a tab"),
        ("a: 1\n---\nb: 2", "but found another document"),
        ("? [1, 2]\n: 3", "key"),
        ("1: 2", "the key 1 is not text"),
        ("a: .nan", "a: nan is not a number"),
    ],
)
def test_what_yaml_could_do_beyond_json_is_refused(content: str, told: str, tmp_path: Path) -> None:
    assert told in refusal(write(tmp_path, "a.yaml", content))


@pytest.mark.parametrize("name", ["a.json", "b.json", "a.toml", "a.yaml"])
def test_a_key_that_is_given_twice_is_refused_in_every_form(name: str, tmp_path: Path) -> None:
    twice = {
        "a.json": '{"datasets": 1, "datasets": 2}',
        "b.json": "{datasets: 1, datasets: 2}",
        "a.toml": "datasets = 1\ndatasets = 2",
        "a.yaml": "datasets: 1\ndatasets: 2",
    }
    assert "given twice" in refusal(write(tmp_path, name, twice[name]))


DEEP = 1200
ABSURD = {
    "deep.json": ('{"a":' * DEEP + "1" + "}" * DEEP, "nested too deeply"),
    "deep5.json": ("{a:" * DEEP + "1" + "}" * DEEP, "nested too deeply"),
    "deep.yaml": ("[" * DEEP + "]" * DEEP, "nested too deeply"),
    "deep.toml": ("a = " + "[" * DEEP + "]" * DEEP, "nested too deeply"),
    "less.json": ('{"a":' * 40 + "1" + "}" * 40, "nested too deeply"),
    "long.json": (
        json.dumps({"datasets": [{"subsets": [{"image_dir": "x" * 160_000}]}]}),
        "datasets[0].subsets[0].image_dir",
    ),
    "infinite.json": (
        '{"datasets": [{"validation_split": 1e999}]}',
        "datasets[0].validation_split: inf is not a number",
    ),
    "nan.json": ('{"a": NaN}', "NaN is not a number"),
    "nan5.json": ("{a: NaN}", "NaN is not a number"),
    "nan.toml": ("a = nan", "a: nan is not a number"),
    "huge.json": ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
    "huge.yaml": ("a: " + "9" * 5000, "a.yaml" if False else "Exceeds the limit"),
    "date.toml": ("a = 1979-05-27", "a: '1979-05-27' is a date or a time. Fix: put it in quotes"),
    "empty.json": ("", "it is empty"),
    "zero.json": ("\0\0\0", "is not JSON"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    content, told = ABSURD[name]
    message = refusal(write(tmp_path, name, content))
    assert told in message and name in message and len(message) < 600


def test_a_long_text_is_refused_by_its_length() -> None:
    with pytest.raises(ValueError, match=r"a is a text of 16,385 characters\. Allowed: up to 16,384"):
        parse(json.dumps({"a": "x" * (MAX_TEXT + 1)}), "json")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"dataset": [{"subsets": [{}]}]}, "the key 'dataset' is not known; did you mean datasets?"),
        (
            {"datasets": [{"subset": [{"image_dir": "/a"}]}]},
            "datasets[0].subset is not a key of a dataset; did you mean subsets?",
        ),
        ({"datasets": [{"subset": {"image_dir": "/a"}}]}, "did you mean subsets?"),
        ({"datasets": {"subsets": [{}]}}, "datasets is one object, but must be a list. Fix: put it in [ ]"),
        ({"subsets": [{"image_dir": "/a"}]}, 'subsets is at the top level, and belongs in a dataset. Fix: {"datasets"'),
        (
            {"image_dir": "/a", "num_repeats": 2},
            "image_dir, num_repeats: keys of a dataset or a subset are at the top level",
        ),
        ({"general": {}}, "the key 'datasets' is missing. Fix: "),
        ([{"image_dir": "/a"}], "it is a list, but must be an object. Fix: "),
        ([{"id": "my-set", "type": "local"}], "the key 'id' is not known; an object"),
        ({"job": "extension", "config": {}}, "the key 'job' is not known; an object"),
        ({"caption_extension": ".txt", "optimizer_type": "x"}, "the key 'optimizer_type' is not known"),
    ],
)
def test_a_wrong_outline_is_named_with_the_fix(config: Any, told: str) -> None:
    message = refusal(json.dumps(config))
    assert told in message and message.count("\n") == 1


def test_the_fix_that_messages_show_is_right() -> None:
    fix = refusal(json.dumps([{}])).partition("Fix: ")[2].rstrip(".")
    assert read_manifest(fix, None, packaged=NOWHERE).datasets[0].subsets[0].source.location == "/data/photos"


# ---- a path in the file


def test_a_relative_folder_may_be_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    path = write(
        tmp_path / "mine", "d.json", '{"datasets": [{"resolution": 512, "subsets": [{"image_dir": "photos"}]}]}'
    )
    manifest = read_manifest(path, None, packaged=NOWHERE)
    assert manifest.datasets[0].subsets[0].source.location == str(tmp_path / "mine" / "photos")
    assert "but beside the file" in manifest.notes[0]
    (tmp_path / "start" / "photos").mkdir()  # where the program starts comes first
    manifest = read_manifest(path, None, packaged=NOWHERE)
    assert manifest.datasets[0].subsets[0].source.location == str(tmp_path / "start" / "photos") and not manifest.notes


def test_a_page_of_the_hub_is_a_dataset_and_no_folder() -> None:
    page = "https://huggingface.co/datasets/owner/name/tree/v2"
    source = read_manifest(json.dumps({"datasets": [{"subsets": [{"dataset": page}]}]}), None, packaged=NOWHERE)
    found = source.datasets[0].subsets[0].source
    assert (found.kind, found.location, found.revision) == ("hub", "owner/name", "v2")
    assert "Fix: dataset 'owner/name'" in refusal(json.dumps({"datasets": [{"subsets": [{"image_dir": page}]}]}))


# ---- this program's own files, named by their paths


@pytest.mark.parametrize("copied", [False, True])
def test_the_own_files_by_path_mean_the_same(copied: bool, tmp_path: Path) -> None:
    paths = [PACKAGED / "dataset.json", PACKAGED / "prompts.txt"]
    if copied:
        paths = [Path(shutil.copy(path, tmp_path)) for path in paths]
    by_path = read_manifest(*map(str, paths))
    built_in = read_manifest(None, None)
    assert by_path.datasets == built_in.datasets and by_path.datasets_packaged and by_path.prompts_packaged
    assert [prompt.text for prompt in by_path.prompts] == [prompt.text for prompt in built_in.prompts]
    changed = tmp_path / "changed.json"
    changed.write_text(paths[0].read_text().replace('"num_repeats": 1', '"num_repeats": 2'))
    assert not read_manifest(str(changed), None).datasets_packaged


# ---- prompts


@pytest.mark.parametrize(
    "line",
    [
        "a cat \u2014w 768 \u2014d 7",
        "a cat \u2013w 768 \u2013d 7",
        "a cat \u2212\u2212w 768 \u2212\u2212d 7",
        "a cat \uff0d\uff0d\uff57 \uff17\uff16\uff18\u3000--d 7",
        "a cat\u00a0--w\u00a0768\u00a0--d\u00a07",
        "a cat --W 768 --D 7",
        "a cat --width 768 --seed 7",
        "a cat --w=768 --d=7",
        "a cat --w768 --d7",
        "a cat -w 768 -d 7",
        "\u200ba cat --w 768\ufeff --d 7",
    ],
)
def test_flags_are_read_as_editors_leave_them(line: str) -> None:
    manifest = read_manifest(None, f"{line}\n# end", packaged=NOWHERE)
    (prompt,) = manifest.prompts
    assert (prompt.text, prompt.width, prompt.seed) == ("a cat", 768, 7)
    is_plain = "--w" in line.lower() and not any(odd in line for odd in ("=", "w768", "width"))
    assert bool(manifest.notes) != is_plain
    assert all("line 1: " in note and " is read as --" in note for note in manifest.notes)


@pytest.mark.parametrize(
    "text",
    [
        "a cat \u2014 sitting",
        "a -5 degree day",
        "a cat \u2013sitting down",
        "well-known",
        "a cat -n blurry",
        "r-w 5 x",
        "a \u2014cat 5",
    ],
)
def test_dashes_of_a_sentence_stay_in_it(text: str) -> None:
    manifest = read_manifest(None, f"{text}\n#", packaged=NOWHERE)
    assert [prompt.text for prompt in manifest.prompts] == [text] and not manifest.notes


def test_a_negative_prompt_after_a_long_dash_keeps_its_text() -> None:
    (prompt,) = read_manifest(None, "a cat \u2014n blurry, 5 dogs --s 4\n#", packaged=NOWHERE).prompts
    assert (prompt.text, prompt.negative, prompt.steps) == ("a cat", "blurry, 5 dogs", 4)


def test_a_line_of_absurd_length_is_named() -> None:
    with pytest.raises(SettingsError, match="line 2: it has 160,000 characters"):
        read_manifest(None, "a cat\n" + "x" * 160_000, packaged=NOWHERE)
