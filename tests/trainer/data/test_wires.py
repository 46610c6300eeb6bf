"""Every key of dataset.json, at every level that has it, reaches the images, views, captions and weights of an epoch.

Each row is one dataset: the key at a value that is not its default, and what an epoch then shows. With the default it
shows something else. A new key without a row fails the first test.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from entrypoint.dataset_config.manifest import LEVELS
from tests.support.drawings import draw
from tests.support.recordings import planned
from trainer.data.order.variants import Example
from trainer.data.render import render, render_mask
from trainer.data.scan import scan
from trainer.job.rolling.rolling_cache import make_sampler

TAGS = {"a": "one, two, three", "b": "one, two, four", "c": "one, two, five"}


@dataclass
class Shown:
    """What a plan makes of the images: the sampler, and the examples of its first four epochs."""

    plan: Any
    sampler: Any

    @property
    def epochs(self) -> list[list[Example]]:
        return [[example for batch in self.sampler.epoch(n) for example in batch] for n in range(4)]

    @property
    def examples(self) -> list[Example]:
        return [example for epoch in self.epochs for example in epoch]

    def captions(self, name: str = "a.png") -> set[str]:
        return {example.caption for example in self.examples if example.image.name == name}

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return {example.image.name[0]: example.view.size for example in self.examples}

    @property
    def source(self) -> Any:
        return self.plan.data.datasets[0].subsets[0].source


@dataclass
class Key:
    value: Any
    see: Any  # of Shown
    expected: Any
    subset: dict[str, Any] = field(default_factory=dict)  # what is set besides
    dataset: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=lambda: TAGS)
    variables: dict[str, str] = field(default_factory=dict)


def folder_of_images(folder: Path, captions: dict[str, str]) -> Path:
    """a: 96 x 64 with a transparent left half; b: 64 x 96; c: 40 x 40. A mask of b, and a table of captions."""
    for name, size in (("a", (96, 64)), ("b", (64, 96)), ("c", (40, 40))):
        image = draw(*size, seed=ord(name))
        if name == "a":
            image.putalpha(Image.fromarray(np.repeat([[0] * 48 + [255] * 48], 64, axis=0).astype(np.uint8)))
        image.save(folder / f"{name}.png")
        if captions:
            (folder / f"{name}.txt").write_text(captions[name])
            (folder / f"{name}.words").write_text(f"words of {name}")
    (folder / "masks").mkdir()
    Image.new("L", (64, 96), 51).save(folder / "masks" / "b.png")
    rows = [{"file_name": f"{name}.png", "text": f"row {name}", "other": f"other {name}"} for name in "abc"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shown(place: Path, key: Key, level: str = "", name: str = "") -> Shown:
    """The epochs of the dataset of `key`; with `name` at its value in `level`."""
    levels: dict[str, dict[str, Any]] = {
        "general": {"caption_extension": ".txt"},
        "a dataset": {"resolution": 64, **key.dataset},
        "a subset": {"image_dir": str(place), **key.subset},
    }
    if name:
        if name in levels["general"]:
            del levels["general"][name]
        if level != "a dataset":
            levels["a dataset"].pop(name, None)
        levels[level][name] = key.value
    subsets = [levels["a subset"], {"image_dir": str(place)}] if name == "is_reg" else [levels["a subset"]]
    dataset = {**levels["a dataset"], "subsets": subsets}
    config = {"general": levels["general"], "datasets": [dataset]}
    plan = planned(place.parent, "flux", json.dumps(config), **key.variables)
    return Shown(plan, make_sampler(plan, scan(plan.data, cpu_workers=0)))


def masks(of: Shown) -> dict[str, float | None]:
    """The mean of each image's mask."""
    means: dict[str, float | None] = {}
    for example in of.epochs[0]:
        mask = render_mask(example.image, example.view)
        means[example.image.name[0]] = None if mask is None else round(float(mask.mean()), 1)
    return means


def held_out(of: Shown) -> list[str]:
    return [image.name for image in of.sampler.held_out]


def nearest(of: Shown) -> bool:
    """Whether the pixels of the small image are those of Pillow's own nearest neighbours."""
    example = next(example for example in of.examples if example.image.name == "c.png")
    enlarged = Image.open(example.image.file).resize((64, 64), Image.Resampling.NEAREST)
    return np.array_equal(render(example.image, example.view), np.asarray(enlarged))


SMALL = {"enable_bucket": True, "resolution": 64, "bucket_reso_steps": 16}
VIEWS = {"shuffle_caption": True}
REG = {"variables": {"PARAMS_PRIOR_LOSS_WEIGHT": "0.25"}}
KEYS: dict[str, Key] = {
    "resolution": Key([96, 32], lambda s: s.sizes, dict.fromkeys("abc", (96, 32))),
    "batch_size": Key(2, lambda s: sorted(map(len, s.sampler.epoch(0))), [1, 2]),
    "enable_bucket": Key(True, lambda s: s.sizes, {"a": (80, 48), "b": (48, 80), "c": (64, 64)}),
    "min_bucket_reso": Key(64, lambda s: set(s.sizes.values()), {(64, 64)}, dataset=SMALL),
    "max_bucket_reso": Key(64, lambda s: set(s.sizes.values()), {(64, 48), (48, 64), (64, 64)}, dataset=SMALL),
    "bucket_reso_steps": Key(32, lambda s: s.sizes["a"], (64, 64), dataset=SMALL),
    "bucket_no_upscale": Key(True, lambda s: s.sizes["c"], (32, 32), dataset=SMALL),
    "validation_split": Key(0.4, lambda s: len(s.sampler.held_out), 1),
    "validation_seed": Key(2, held_out, ["a.png"], dataset={"validation_split": 0.4}),
    "resize_interpolation": Key("nearest", nearest, True),
    "num_repeats": Key(3, lambda s: [e.image.name for e in s.epochs[0]].count("a.png"), 3),
    "shuffle_caption": Key(True, lambda s: len(s.captions()) > 1 and {len(c) for c in s.captions()}, {15}),
    "caption_separator": Key(
        ";", lambda s: s.captions(), {"one, two", "two, one"},
        subset=VIEWS, captions={**TAGS, "a": "one; two"},
    ),
    "keep_tokens": Key(1, lambda s: {c.split(",")[0] for c in s.captions()}, {"one"}, subset=VIEWS),
    "keep_tokens_separator": Key("|||", lambda s: s.captions(), {"k, x"}, captions={**TAGS, "a": "k ||| x"}),
    "secondary_separator": Key(";;", lambda s: s.captions(), {"one,two"}, captions={**TAGS, "a": "one;;two"}),
    "enable_wildcard": Key(True, lambda s: s.captions(), {"x", "y"}, captions={**TAGS, "a": "{x|y}"}),
    "caption_prefix": Key("so", lambda s: s.captions(), {"so one, two, three"}),
    "caption_suffix": Key("end", lambda s: s.captions(), {"one, two, three end"}),
    "caption_dropout_rate": Key(1, lambda s: s.captions(), {""}),
    "caption_dropout_every_n_epochs": Key(
        2, lambda s: [all(e.caption == "" for e in epoch) for epoch in s.epochs], [False, True, False, True]
    ),
    "caption_tag_dropout_rate": Key(1, lambda s: s.captions(), {"one"}, subset={"keep_tokens": 1}),
    "flip_aug": Key(True, lambda s: {e.view.flip for e in s.examples}, {False, True}),
    "color_aug": Key(True, lambda s: len({e.view.colour for e in s.examples}) > 1, True),
    "random_crop": Key(True, lambda s: len({e.view.offset for e in s.examples if e.image.name == "a.png"}) > 1, True),
    "caption_extension": Key(".words", lambda s: s.captions(), {"words of a"}),
    "class_tokens": Key("dog", lambda s: s.captions(), {"dog"}, captions={}),
    "trigger_word": Key("zot", lambda s: s.captions(), {"zot, one, two, three"}),
    "is_reg": Key(True, lambda s: {e.weight for e in s.examples if e.image.subset == 0}, {0.25}, **REG),
    "alpha_mask": Key(True, masks, {"a": 127.5, "b": None, "c": None}),
    "conditioning_data_dir": Key("masks", masks, {"b": 51.0}),
    "metadata_file": Key("rows.jsonl", lambda s: s.captions(), {"row a"}),
    "caption_column": Key("other", lambda s: s.captions(), {"other a"}, subset={"metadata_file": "rows.jsonl"}),
    "image_column": Key("file_name", lambda s: s.source.image_column, "file_name"),
}  # fmt: skip
# Of a dataset on the Hub, and of images that the model draws: key → its value, what is set besides, and the source.
SOURCES = {
    "image_dir": ("/somewhere", {}, ("folder", "/somewhere")),
    "dataset": ("some/one", {}, ("hub", "some/one")),
    "revision": ("v2", {"dataset": "some/one"}, "v2"),
    "split": ("test", {"dataset": "some/one"}, "test"),
    "subset": ("faces", {"dataset": "some/one"}, "faces"),
    "class_prompt": ("a dog", {}, ("generated", "a dog")),
    "num_class_images": (7, {"class_prompt": "a dog"}, 7),
}
# What decides which images a model captions, and by what prompt: tests/trainer/captioning/test_captioning.py.
CAPTIONING = ("auto_caption", "caption_prompt")
PLACES = [(level, name) for level, keys in LEVELS.items() for name in keys if name in KEYS]


def test_every_key_has_a_row():
    assert {*KEYS, *SOURCES, *CAPTIONING} == {name for keys in LEVELS.values() for name in keys}


@pytest.mark.parametrize(("level", "name"), PLACES)
def test_a_key_is_in_the_epochs_of_its_images(level, name, tmp_path):
    key = KEYS[name]
    folder = tmp_path / "pictures"
    folder.mkdir()
    folder_of_images(folder, key.captions)
    assert key.see(shown(folder, key, level, name)) == key.expected
    assert key.see(shown(folder, key)) != key.expected


@pytest.mark.parametrize("name", SOURCES)
def test_a_key_of_a_source_is_in_the_source(name, tmp_path):
    value, others, expected = SOURCES[name]

    def source(keys):
        subsets = [keys, {"image_dir": str(tmp_path)}]
        config = json.dumps({"datasets": [{"resolution": 64, "subsets": subsets}]})
        named = {} if {"image_dir", "dataset", "class_prompt"} & keys.keys() else {"DATASET_NAME": "another/one"}
        found = planned(tmp_path, "flux", config, **named).data.datasets[0].subsets[0].source
        fields = {**dataclasses.asdict(found), "num_class_images": found.count}
        return fields.get(name, (found.kind, found.location))

    assert source({**others, name: value}) == expected
    assert source(others) != expected
