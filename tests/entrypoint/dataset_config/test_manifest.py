"""dataset.json and prompts.txt → records: the complete schema, look-up, and messages that name the place."""

from __future__ import annotations

import dataclasses
import gzip
import http.server
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from entrypoint.dataset_config import documents
from entrypoint.dataset_config.documents import MAX_BYTES
from entrypoint.dataset_config.manifest import (
    DATASET_KEYS,
    LEVELS,
    SHARED_KEYS,
    Manifest,
    read_manifest,
)
from entrypoint.dataset_config.sources import Place, classify
from tests.support.raw_server import RawServer, answer, drip, flood
from trainer.spec.errors import SettingsError, UnreachableError
from trainer.spec.plan import Dataset, Subset

NOWHERE = Path("/nonexistent")


def read(config: Any = None, prompts: str | None = None, **options: Any) -> Manifest:
    text = config if isinstance(config, str) or config is None else json.dumps(config)
    return read_manifest(text, prompts, packaged=NOWHERE, **options)


def refusal(config: Any = None, prompts: str | None = None, **options: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        read(config, prompts, **options)
    return str(caught.value)


def one(subset: dict[str, Any], dataset: dict[str, Any] | None = None, general: dict[str, Any] | None = None) -> Any:
    return {"general": general or {}, "datasets": [{**(dataset or {}), "subsets": [subset]}]}


# ---- the schema of dataset.json

VALUES: dict[str, Any] = {
    "resolution": [640, 384],
    "batch_size": 3,
    "enable_bucket": True,
    "min_bucket_reso": 320,
    "max_bucket_reso": 1536,
    "bucket_reso_steps": 32,
    "bucket_no_upscale": True,
    "validation_split": 0.25,
    "validation_seed": 9,
    "resize_interpolation": "lanczos",
    "num_repeats": 7,
    "shuffle_caption": True,
    "caption_separator": "|",
    "keep_tokens": 2,
    "keep_tokens_separator": "|||",
    "secondary_separator": ";;",
    "enable_wildcard": True,
    "caption_prefix": "a ",
    "caption_suffix": " z",
    "caption_dropout_rate": 0.1,
    "caption_dropout_every_n_epochs": 2,
    "caption_tag_dropout_rate": 0.2,
    "flip_aug": True,
    "color_aug": True,
    "random_crop": True,
    "caption_extension": ".txt",
    "class_tokens": "dog",
    "trigger_word": "zot",
    "auto_caption": False,
    "caption_prompt": "style",
    "is_reg": True,
    "alpha_mask": True,
    "metadata_file": "meta.jsonl",
    "conditioning_data_dir": "masks",
}


def value_of(manifest: Manifest, key: str) -> Any:
    dataset = manifest.datasets[0]
    value = getattr(dataset if key in DATASET_KEYS else dataset.subsets[0], key)
    return list(value) if isinstance(value, tuple) else value


def test_every_field_of_the_plan_has_a_key():
    fields = {f.name for kind in (Dataset, Subset) for f in dataclasses.fields(kind)}
    made = {"part_of", "folder", "repeats_chosen"}  # by the scan, from the names of folders; and whether a key is set
    assert fields - {"subsets", "source"} - made == VALUES.keys()


@pytest.mark.parametrize("key", [k for k in VALUES if k in DATASET_KEYS])
def test_a_key_of_a_dataset_is_looked_up_there_then_in_general(key):
    assert value_of(read(one({}, {key: VALUES[key]})), key) == VALUES[key]
    assert value_of(read(one({}, {}, {key: VALUES[key]})), key) == VALUES[key]


@pytest.mark.parametrize("key", [k for k in VALUES if k in SHARED_KEYS])
def test_a_key_of_a_subset_is_looked_up_there_then_in_its_dataset_then_in_general(key):
    default = value_of(read(one({})), key)
    assert value_of(read(one({key: VALUES[key]}, {key: default}, {key: default})), key) == VALUES[key]
    assert value_of(read(one({}, {key: VALUES[key]}, {key: default})), key) == VALUES[key]
    assert value_of(read(one({}, {}, {key: VALUES[key]})), key) == VALUES[key]


@pytest.mark.parametrize("key", ["alpha_mask", "metadata_file", "conditioning_data_dir"])
def test_some_keys_are_of_a_subset_alone(key):
    assert value_of(read(one({key: VALUES[key]})), key) == VALUES[key]
    assert "it belongs to a subset" in refusal(one({}, {key: VALUES[key]}))


def test_the_defaults_are_those_of_the_schema():
    dataset = read(one({})).datasets[0]
    assert (dataset.batch_size, dataset.enable_bucket) == (1, False)
    assert (dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps) == (256, 1024, 64)
    subset = dataset.subsets[0]
    assert (subset.num_repeats, subset.caption_extension, subset.caption_separator) == (1, ".caption", ",")


def test_it_is_said_which_keys_of_a_dataset_were_given():
    assert read(one({}, {"batch_size": 2}, {"resolution": 512})).named == (frozenset({"batch_size", "resolution"}),)


def test_a_null_is_as_good_as_nothing():
    manifest = read(one({"num_repeats": None}, {"num_repeats": 3, "validation_seed": None}))
    assert value_of(manifest, "num_repeats") == 3 and "validation_seed" not in manifest.named[0]


def test_datasets_and_subsets_keep_their_order():
    config = {"datasets": [{"resolution": r, "subsets": [{"num_repeats": n} for n in (1, 2)]} for r in (512, 1024)]}
    datasets = read(config).datasets
    assert [d.resolution for d in datasets] == [(512, 512), (1024, 1024)]
    assert [s.num_repeats for s in datasets[1].subsets] == [1, 2]


@pytest.mark.parametrize("level", LEVELS)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest_one(level):
    key = "num_repeat"
    config = {"general": one({}, {}, {key: 1}), "a dataset": one({}, {key: 1}), "a subset": one({key: 1})}[level]
    place = {"general": "general", "a dataset": "datasets[0]", "a subset": "datasets[0].subsets[0]"}[level]
    assert f"{place}.num_repeat is not a key of {level}; did you mean num_repeats?" in refusal(config)


def test_an_unknown_key_at_the_top_is_named():
    assert "the key 'dataset' is not known" in refusal({"dataset": []})


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("num_repeats", 0),
        ("num_repeats", 1.0),
        ("num_repeats", "1"),
        ("num_repeats", True),
        ("num_repeats", []),
        ("flip_aug", "true"),
        ("flip_aug", 1),
        ("caption_dropout_rate", 1.5),
        ("caption_dropout_rate", "0.1"),
        ("caption_prefix", 3),
        ("resize_interpolation", "cubic"),
        ("keep_tokens", -1),
    ],
)
def test_a_wrong_value_is_named_with_its_path_and_what_is_allowed(key, wrong):
    config = {"datasets": [{"subsets": [{}]}, {"subsets": [{}, {key: wrong}]}]}
    message = refusal(config)
    assert f"datasets[1].subsets[1].{key}: {wrong!r} is not " in message


@pytest.mark.parametrize("wrong", [0, [512], [512, 512, 512], [512, "512"], "512", 512.0, None, [True, 512]])
def test_a_resolution_is_a_number_or_two(wrong):
    if wrong is None:
        assert "resolution" not in read(one({}, {"resolution": wrong})).named[0]
    else:
        assert "datasets[0].resolution" in refusal(one({}, {"resolution": wrong}))


@pytest.mark.parametrize(
    "wrong", [{}, {"datasets": []}, {"datasets": [{}]}, {"datasets": {}}, {"datasets": [{"subsets": [1]}]}]
)
def test_datasets_and_subsets_are_lists_of_objects(wrong):
    assert "datasets" in refusal(wrong)


def test_regularisation_pictures_alone_are_refused():
    assert "is_reg" in refusal(one({"is_reg": True}))


def test_all_problems_of_both_files_are_in_one_message(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --x 1\n", encoding="utf-8")
    message = refusal(one({"num_repeats": 0, "flipaug": True}, {"batch_size": "1"}), str(prompts))
    assert all(word in message for word in ("num_repeats", "flipaug", "batch_size", "--x")) and message.count("\n") == 4


# ---- where pictures come from


def test_a_subset_names_a_folder_an_archive_or_a_hub_dataset(tmp_path):
    def source(**subset: Any) -> tuple[str, str]:
        made = read(one(subset)).datasets[0].subsets[0].source
        return made.kind, made.location

    assert source(image_dir=str(tmp_path)) == ("folder", str(tmp_path))
    assert source(image_dir="not/there/yet") == ("folder", str(Path.cwd() / "not/there/yet"))
    assert source(image_dir="/a/b.tar.gz") == ("archive", "/a/b.tar.gz")
    assert source(image_dir="https://x.org/b.zip") == ("archive", "https://x.org/b.zip")
    assert source(dataset="org/name") == ("hub", "org/name")
    assert source() == ("", "")


def test_a_hub_dataset_has_revision_split_and_columns():
    keys = {"revision": "v1", "split": "test", "image_column": "img", "caption_column": "text"}
    source = read(one({"dataset": "org/name", **keys})).datasets[0].subsets[0].source
    assert {key: getattr(source, key) for key in keys} == keys


@pytest.mark.parametrize("other", [{"dataset": "org/name"}, {"split": "test"}, {"revision": "v1"}, {"subset": "a"}])
def test_a_folder_has_none_of_them(other):
    assert "image_dir does not go together" in refusal(one({"image_dir": "/a", **other}))


def test_a_folder_has_columns_of_its_metadata_file():
    source = (
        read(one({"image_dir": "/a", "image_column": "img", "caption_column": "text"})).datasets[0].subsets[0].source
    )
    assert (source.kind, source.image_column, source.caption_column) == ("folder", "img", "text")


def test_regularisation_images_have_no_trigger_word():
    assert "get no trigger word" in refusal(one({"is_reg": True, "trigger_word": "zot"}, {}))


@pytest.mark.parametrize("archive", ["a.zip", "/a/b.TAR", "./b.tar.gz", "b.tgz", "b.tar.bz2", "~/b.tar.xz"])
def test_archives_are_known_by_their_endings(archive):
    place = classify(archive)
    assert place.kind == "archive" and Path(place.location).is_absolute()


@pytest.mark.parametrize("url", ["https://x.org/a.zip", "http://x.org/a.tar?key=1", "https://x.org/download?id=3"])
def test_a_url_is_an_archive(url):
    assert classify(url) == Place("archive", url)


def test_an_existing_folder_comes_before_a_hub_dataset_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert classify("org/name") == Place("hub", "org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert classify("org/name") == Place("folder", str(tmp_path / "org" / "name"))


@pytest.mark.parametrize("name", ["/a/b", "./pictures", "../pictures", "~/pictures"])
def test_what_looks_like_a_path_is_a_folder(name):
    assert classify(name).kind == "folder"


@pytest.mark.parametrize(
    "wrong",
    [
        "a/b/c",
        "a b",
        "",
        "café/x",
        "a.rar",
        "a.tar.zst",
        "a.7z",
        "ftp://bucket/a.zip",
        "ftp://x.org/a.zip",
        "https://",
        "https://x.org/a.rar",
        "https://user:password@x.org/a.zip",
        "https://huggingface.co/org/model",
        __file__,
    ],
)
def test_anything_else_is_refused(wrong):
    with pytest.raises(ValueError, match=r"Allowed|Fix|neither") as caught:
        classify(wrong)
    assert "password@" not in str(caught.value)


# ---- path, URL, inline; JSON, TOML


def test_dataset_json_is_a_path_or_the_json_itself(tmp_path):
    config = one({"num_repeats": 4})
    path = tmp_path / "dataset.json"
    path.write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    assert read(str(path)).datasets == read(json.dumps(config)).datasets


def test_toml_has_the_same_shape(tmp_path):
    path = tmp_path / "dataset.toml"
    path.write_text(
        "[general]\nflip_aug = true\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nnum_repeats = 4\n"
    )
    subset = read(str(path)).datasets[0].subsets[0]
    assert subset.flip_aug and subset.num_repeats == 4


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"{", "is not JSON"),
        ("a.json", b'{"datasets": [], "datasets": []}', "given twice"),
        ("a.json", b'{"datasets": NaN}', "not a number"),
        ("a.json", b"\xff", "not UTF-8"),
        ("a.json", b"\xff\xfe", "it is empty"),
        ("a.json", b"\n", "it is empty"),
        ("a.json", b" " * (MAX_BYTES + 1), "larger than 1 MiB"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.toml", b"a = ", "is not TOML"),
        ("a.toml", b"datasets = 1979-05-27", "datasets: '1979-05-27' is a date"),
        ("a.json", None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = refusal(str(path))
    assert str(path) in message and reason in message


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "dataset.json")
    assert "cannot be read: a FIFO, not a file" in refusal(str(tmp_path / "dataset.json"))
    assert "cannot be read: a device, not a file" in refusal("/dev/zero")


@pytest.mark.parametrize(
    "wrong", ["/", "\x7f", "x" * 5000, "ftp://x.org/a.json", "http://[", "http://a b/", "file:///etc/passwd"]
)
def test_what_is_neither_is_refused(wrong):
    assert "DATASET_CONFIG" in refusal(wrong)


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = self.server.answers[self.path.split("?")[0]]  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url():
    """The address of a server with an answer for each path, and an opener that goes there without a proxy."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.answers = {  # type: ignore[attr-defined]
        "/dataset.json": (200, json.dumps(one({"num_repeats": 4})).encode()),
        "/dataset.toml": (200, b"[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 4\n"),
        "/prompts": (200, b"a cat\na dog --w 512\n"),
        "/large": (200, b" " * (MAX_BYTES + 100)),
        "/missing": (404, b""),
        "/busy": (503, b""),
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/dataset.json", "/dataset.toml", "/dataset.json?key=1"])
def test_dataset_json_may_be_a_url(url, path):
    assert read(url + path).datasets[0].subsets[0].num_repeats == 4


def test_prompts_may_be_a_url(url):
    assert [p.text for p in read(None, url + "/prompts").prompts] == ["a cat", "a dog"]


@pytest.mark.parametrize(("path", "reason"), [("/missing", "answers 404"), ("/large", "larger than 1 MiB")])
def test_a_url_without_the_file_is_refused(url, path, reason):
    message = refusal(f"{url}{path}?key=canary")
    assert reason in message and "canary" not in message


def test_a_server_that_is_busy_or_gone_is_worth_another_try(url):
    for address in (f"{url}/busy", "http://127.0.0.1:1/x.json"):
        with pytest.raises(UnreachableError):
            read(address)


HOSTILE = {
    "a head that never ends": (lambda c, h: drip(b"HTTP/1.1 200 OK\r\n", every=0.05), UnreachableError),
    "a byte now and then": (lambda c, h: drip(b"HTTP/1.1 200 OK\r\n\r\n", every=0.05), UnreachableError),
    "a loop of redirects": (lambda c, h: answer(status="302 F", location="/a"), UnreachableError),
    "nonsense": (lambda c, h: b"x\r\n\r\n", UnreachableError),
    "a redirect to a file": (lambda c, h: answer(status="302 F", location="file:///etc/passwd"), SettingsError),
    "no end": (lambda c, h: flood(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 2**16), SettingsError),
    "packed": (lambda c, h: answer(gzip.compress(b"{}"), content_encoding="gzip"), SettingsError),
}


@pytest.mark.parametrize(("script", "kind"), HOSTILE.values(), ids=HOSTILE)
def test_a_server_that_does_not_end_or_leads_astray(monkeypatch, script, kind):
    monkeypatch.setattr(documents, "DOWNLOAD_TIMEOUT_S", 0.9)
    with RawServer(script) as server:
        for place in ((f"{server.url}/a.json", None), (None, f"{server.url}/a.txt")):
            with pytest.raises(kind):
                read(*place)


# ---- prompts


def prompts_of(tmp_path: Path, text: str, *, name: str = "prompts.txt") -> Manifest:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read(None, str(path))


def test_a_line_is_a_prompt_with_flags(tmp_path):
    text = "\ufeff# comment\n\na cat, sitting --W 640 --h 384 --d 7 --s 12 --l 4.5 --g 3 --n blurry, dark \r\nA dog\n"
    cat, watchdog = prompts_of(tmp_path, text).prompts
    assert (cat.text, cat.width, cat.height, cat.seed, cat.steps) == ("a cat, sitting", 640, 384, 7, 12)
    assert (cat.cfg, cat.guidance, cat.negative) == (4.5, 3.0, "blurry, dark")
    assert dataclasses.astuple(watchdog)[1:] == ("A dog", *[None] * 7)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("a cat --x 1", "--x is not a flag"),
        ("a cat --w", "--w"),
        ("a cat --w=8", "--w=8: 8 is not"),
        ("a cat --x=8", "--x=8 is not a flag"),
        ("a cat \u2014x 8", "\u2014x is not a flag"),
        ("a cat --ar 16:9", "--ar is not a flag"),
        ("a cat --w 6e2", "--w: '6e2' is not a whole number, 16 to 8192"),
        ("a cat --w 8", "--w: 8 is not"),
        ("a cat --d -1", "--d"),
        ("a cat --s 0", "--s"),
        ("a cat --l nan", "--l"),
        ("a cat --w 64 --W 64", "--W is given twice"),
        ("a cat -- w 64", "is not a flag"),
        ("--w 64", "there is no prompt"),
    ],
)
def test_a_bad_flag_names_its_line(tmp_path, line, word):
    with pytest.raises(SettingsError) as caught:
        prompts_of(tmp_path, f"a dog\n# comment\n{line}\na bird\n")
    assert "prompts.txt, line 3: " in str(caught.value) and word in str(caught.value)


def test_prompts_may_be_json(tmp_path):
    listed = ["a cat --w 512", {"prompt": "a dog", "width": 256, "scale": 3, "negative_prompt": "dark", "s": 4}]
    for shape in (listed, {"prompts": listed}):
        cat, watchdog = prompts_of(tmp_path, json.dumps(shape), name="p.json").prompts
        assert (cat.text, cat.width) == ("a cat", 512)
        assert (watchdog.text, watchdog.width, watchdog.cfg, watchdog.negative, watchdog.steps) == (
            "a dog",
            256,
            3.0,
            "dark",
            4,
        )
    assert len(read(None, json.dumps(listed)).prompts) == 2


def test_prompts_may_be_toml(tmp_path):
    text = '[prompt]\nwidth = 256\nsample_steps = 9\n[[prompt.subset]]\nprompt = "a cat"\n'
    text += '[[prompt.subset]]\nprompt = "a dog"\nwidth = 512\n'
    cat, watchdog = prompts_of(tmp_path, text, name="p.toml").prompts
    assert (cat.text, cat.width, cat.steps) == ("a cat", 256, 9) and (watchdog.width, watchdog.steps) == (512, 9)
    assert prompts_of(tmp_path, 'prompts = ["a cat"]', name="q.toml").prompts[0].text == "a cat"


@pytest.mark.parametrize(
    "wrong",
    [
        [1],
        [{"width": 64}],
        [{"prompt": "a", "widht": 64}],
        [{"prompt": "a", "w": 64, "width": 64}],
        [{"prompt": "a", "w": "64"}],
        {},
        "",
    ],
)
def test_wrong_prompts_in_json_are_named_with_their_place(tmp_path, wrong):
    with pytest.raises(SettingsError, match=r"p\.json"):
        prompts_of(tmp_path, json.dumps(wrong), name="p.json")


# ---- this program's own files


def test_the_packaged_files_are_read_where_the_user_names_none():
    manifest = read_manifest(None, None)
    assert manifest.datasets_packaged and manifest.prompts_packaged
    assert manifest.datasets[0].subsets[0].source.kind == "" and 3 <= len(manifest.prompts) <= 4


def test_without_them_there_is_one_empty_subset():
    assert len(read().datasets) == 1 and read().prompts == ()


# ---- anything at all

KEYS = st.sampled_from(
    [*{k for keys in LEVELS.values() for k in keys}, "general", "datasets", "subsets", "prompt", "subset"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(), inner, max_size=5)
)


@given(TREES, TREES, st.dictionaries(KEYS, LEAVES), st.dictionaries(KEYS, LEAVES))
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_json_is_a_manifest_or_a_settings_error(tree, general, dataset, subset):
    for config in (tree, {"datasets": tree}, {"general": general, "datasets": [{**dataset, "subsets": [subset]}]}):
        outcome(json.dumps(config) if isinstance(config, dict) else "{" + json.dumps(config), None)


@given(st.lists(TREES, max_size=3))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_json_is_prompts_or_a_settings_error(tree):
    outcome(None, json.dumps(tree))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prompts") / "prompts.txt"


@given(
    text=st.lists(st.text() | st.sampled_from([" --w ", " --n ", " --d 1", " --l 1e-4", "#", "\n", "a cat"])).map(
        "".join
    )
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_text_is_prompts_or_a_settings_error(scratch, text):
    scratch.write_bytes(text.encode())
    outcome(None, str(scratch))


def outcome(config: str | None, prompts: str | None) -> None:
    try:
        manifest = read_manifest(config, prompts, packaged=NOWHERE)
    except SettingsError:
        return
    assert all(d.subsets for d in manifest.datasets)
    json.dumps(dataclasses.asdict(manifest), default=sorted, ensure_ascii=False).encode()


@pytest.mark.parametrize("text", ["null", "null\n"])
def test_a_file_that_says_null_is_refused(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(SettingsError, match="it is null, but must be an object"):
        read_manifest(str(tmp_path / "data.json"), None)


@pytest.mark.parametrize(
    ("extension", "says"),
    [
        ("txt", "has no dot"),
        (".", "is no extension of a file"),
        ("./x", "is no extension of a file"),
        (".PNG", "is that of images or videos"),
        (".caption.jpg", "is that of images or videos"),
        (".heic", "is that of images or videos"),
        (".mp4", "is that of images or videos"),
        (".safetensors", "is that of models"),
        (".ckpt", "is that of models"),
    ],
)
def test_captions_are_in_no_files_of_images_and_models(extension, says):
    text = json.dumps({"general": {"caption_extension": extension}, "datasets": [{"subsets": [{}]}]})
    with pytest.raises(SettingsError, match=says):
        read_manifest(text, None)
