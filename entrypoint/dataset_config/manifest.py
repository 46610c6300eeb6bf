"""dataset.json and prompts.txt → `Manifest`. Nothing is guessed; a bad key or line is named with its place.

dataset.json has three levels: `general`, its `datasets`, and their `subsets`. The tables below say which keys are known
at which level and what they may hold; the names are those of sd-scripts' dataset configuration, where it has them. A
value is looked up in the subset, then in its dataset, then in `general`; `trainer.spec.plan` has the default.

How to add a key:
1. Give `trainer.spec.plan.Dataset` or `Subset` a field of the key's name, with its default.
2. Add the key to DATASET_KEYS (about a dataset as a whole: sizes, batches, validation), SHARED_KEYS (about a subset,
   and worth a default for all), or OWN_KEYS (about one subset alone), with the values that it may have.
3. Use the field in `trainer.data`. If it changes how images or captions are encoded, it belongs into the cache's key.
4. A check that needs other values than the key's own goes to `_subset` below; to `complete` if it needs the model.
5. Add a row to docs/dataset-json.md and a value to VALUES in tests/entrypoint/dataset_config/test_manifest.py; both
tests fail until then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entrypoint.dataset_config import shapes
from entrypoint.dataset_config.documents import is_inline, label, read_text
from entrypoint.dataset_config.sources import HUB_ID, classify
from entrypoint.settings.checks import absolute, is_file, is_folder
from trainer.base_model.model_folder import FILE, PICKLES
from trainer.data.folders import formats
from trainer.spec.documents.forms import parse_text
from trainer.spec.documents.prompt_trees import parse_tree
from trainer.spec.plan import Dataset, Source, Subset
from trainer.spec.prompts import PromptRequest, parse_lines
from trainer.spec.values import Key, Problems, show, suggestion

PACKAGED = Path(__file__).resolve().parents[2]  # the folder with this program's own dataset.json and prompts.txt

# ---- the keys. A Key says what a value may be: its type and range, or its choices.

_SIDE = Key("integer", 16, 16384)  # pixels
_RATE = Key("number", 0, 1)  # a probability
_COUNT = Key("integer", 0, 10**6)
_TEXT = Key("text")
_FLAG = Key("boolean")

# Of a dataset: how its images are resized, batched and held out. `general` may give defaults; a subset may not differ,
# since a batch is drawn from all subsets of a dataset.
DATASET_KEYS = {
    "resolution": Key("size", 16, 8192),
    "batch_size": Key("integer", 1, 4096),
    "enable_bucket": _FLAG,
    "min_bucket_reso": _SIDE,
    "max_bucket_reso": _SIDE,
    "bucket_reso_steps": Key("integer", 1, 2048),
    "bucket_no_upscale": _FLAG,
    "validation_split": Key("number", 0, 0.99),  # a share: something must be left to train on
    "validation_seed": Key("integer", 0, 2**32 - 1),
}
# Of a subset: repeats, captions, augmentation. Its dataset and `general` may give defaults.
SHARED_KEYS = {
    "resize_interpolation": Key("text", choices=("lanczos", "nearest", "bilinear", "bicubic", "area", "box")),
    "num_repeats": Key("integer", 1, 10**6),
    "shuffle_caption": _FLAG,
    "caption_separator": _TEXT,
    "keep_tokens": _COUNT,
    "keep_tokens_separator": _TEXT,
    "secondary_separator": _TEXT,
    "enable_wildcard": _FLAG,
    "caption_prefix": _TEXT,
    "caption_suffix": _TEXT,
    "caption_dropout_rate": _RATE,
    "caption_dropout_every_n_epochs": _COUNT,
    "caption_tag_dropout_rate": _RATE,
    "flip_aug": _FLAG,
    "color_aug": _FLAG,
    "random_crop": _FLAG,
    "caption_extension": _TEXT,
    "class_tokens": _TEXT,
    "auto_caption": _FLAG,
    "caption_prompt": _TEXT,
    "trigger_word": _TEXT,  # "": none, whatever TRIGGER_WORD is
}
# Of a subset alone: where its images come from (LOCATION_KEYS, HUB_KEYS, COLUMN_KEYS, CLASS_KEYS), and what they are
# (OWN_KEYS).
LOCATION_KEYS = {"image_dir": _TEXT, "dataset": _TEXT}
HUB_KEYS = {"revision": _TEXT, "split": _TEXT, "subset": _TEXT}
COLUMN_KEYS = {"image_column": _TEXT, "caption_column": _TEXT}  # of a Hub dataset, or of a metadata file
CLASS_KEYS = {"class_prompt": _TEXT, "num_class_images": Key("integer", 1, 100_000)}  # the model generates the images
OWN_KEYS = {"is_reg": _FLAG, "alpha_mask": _FLAG, "metadata_file": _TEXT, "conditioning_data_dir": _TEXT}
SUBSET_KEYS = {**LOCATION_KEYS, **HUB_KEYS, **COLUMN_KEYS, **CLASS_KEYS, **OWN_KEYS}
LEVELS = {  # by the words for a level in messages
    "general": {**DATASET_KEYS, **SHARED_KEYS},
    "a dataset": {**DATASET_KEYS, **SHARED_KEYS},
    "a subset": {**SHARED_KEYS, **SUBSET_KEYS},
}

DEFAULT_CLASS_IMAGES = 100  # where num_class_images is not set
NOT_WITH_CLASS_PROMPT = (
    "class_tokens",
    "alpha_mask",
    "metadata_file",
    "conditioning_data_dir",
)  # made for given images
PATH_KEYS = ("image_dir", "metadata_file", "conditioning_data_dir")
FROM_DATASET_NAME = Source(kind="", location="", split="")  # the source of a subset that names none


@dataclass(frozen=True)
class Manifest:
    """The content of dataset.json and prompts.txt.

    A dataset's resolution is (0, 0) if it is not set, and a subset's source may be FROM_DATASET_NAME:
    `complete.complete_datasets` fills these in.
    """

    datasets: tuple[Dataset, ...]
    named: tuple[frozenset[str], ...]  # for each dataset: which of DATASET_KEYS are set, there or in general
    prompts: tuple[PromptRequest, ...]
    datasets_packaged: bool  # they are this program's own, not the user's
    prompts_packaged: bool
    origin: str = "dataset.json"  # for messages
    notes: tuple[str, ...] = ()  # what was read otherwise than it is written


def read_manifest(
    dataset_config: str | None,
    sample_prompts: str | None,
    *,
    packaged: Path = PACKAGED,
) -> Manifest:
    """Read what DATASET_CONFIG and SAMPLE_PROMPTS name, or this program's own files.

    Raises SettingsError with a line for each problem in both, UnreachableError if a URL does not answer.
    """
    problems = Problems()
    notes: list[str] = []
    origin = label(dataset_config, "DATASET_CONFIG") if dataset_config else "dataset.json"
    own_tree = _own_tree(packaged)
    tree: Any = own_tree
    if dataset_config:
        tree = _read_tree(dataset_config, origin, problems, notes)
    # A copy of this program's own file means what the file itself means: the model's resolution, for example.
    is_own = not dataset_config or (tree is not None and tree == own_tree)
    if dataset_config and is_own:
        notes.append(f"{origin}: it is this program's own dataset.json, so that the base model chooses the resolution")
    datasets: list[Dataset] = []
    named: list[frozenset[str]] = []
    if tree is not None:
        beside = _folder_of(dataset_config)
        for dataset, keys in _Reader(origin, problems, notes, beside).datasets(tree):
            datasets.append(dataset)
            named.append(keys)
    prompts, own_prompts = _read_prompts(sample_prompts, problems, notes, packaged=packaged)
    problems.raise_if_any("The dataset's description or the prompts cannot be used")
    return Manifest(
        datasets=tuple(datasets),
        named=tuple(named),
        prompts=prompts,
        datasets_packaged=is_own,
        prompts_packaged=own_prompts,
        origin=origin,
        notes=tuple(notes),
    )


def _own_tree(packaged: Path) -> Any:
    """This program's own dataset.json: one dataset, with its images from DATASET_NAME."""
    path = packaged / "dataset.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"datasets": [{"subsets": [{}]}]}


def _read_tree(location: str, origin: str, problems: Problems, notes: list[str]) -> Any:
    text, text_format = read_text(location, "DATASET_CONFIG", problems, default_format="json")
    if text is None:
        return None
    tree = parse_text(text, text_format=text_format, origin=origin, problems=problems, notes=notes)
    if tree is None and not problems.lines:
        problems.add(f"{origin}: it is null, but must be an object. Fix: {shapes.EXAMPLE}.")
    return tree


def _folder_of(document: str | None) -> Path | None:
    """The folder of a document that is a file on this machine."""
    if document is None or is_inline(document) or "://" in document:
        return None
    return Path(absolute(document)).parent


def _read_prompts(
    sample_prompts: str | None,
    problems: Problems,
    notes: list[str],
    *,
    packaged: Path,
) -> tuple[tuple[PromptRequest, ...], bool]:
    """The prompts that SAMPLE_PROMPTS names, or those of this program's own prompts.txt; and whether they are its own.

    A copy of its prompts.txt is the same as that file.
    """
    own_path = packaged / "prompts.txt"
    own_text = own_path.read_text(encoding="utf-8") if own_path.is_file() else ""
    text: str | None = own_text
    text_format = "txt"
    origin = "prompts.txt"
    if sample_prompts:
        origin = label(sample_prompts, "SAMPLE_PROMPTS")
        text, text_format = read_text(sample_prompts, "SAMPLE_PROMPTS", problems, default_format="txt")
    if text is None:
        return (), False
    is_own = text.split() == own_text.split()
    if text_format == "txt":
        return parse_lines(text, origin=origin, problems=problems, notes=notes), is_own
    tree = parse_text(text, text_format=text_format, origin=origin, problems=problems, notes=notes)
    return (() if tree is None else parse_tree(tree, origin=origin, problems=problems, notes=notes)), False


# ---- the levels


@dataclass(frozen=True)
class _Reader:
    """Reads the tree of one document. Problems and notes are added to the lists of the caller."""

    origin: str
    problems: Problems
    notes: list[str]
    beside: Path | None  # the document's folder

    def datasets(self, raw: Any) -> list[tuple[Dataset, frozenset[str]]]:
        """Each dataset with the keys of DATASET_KEYS that are set for it. None, if there is any problem."""
        problem = shapes.problem_of(raw, subset_keys=LEVELS["a subset"], dataset_keys=LEVELS["a dataset"])
        if problem is not None:
            self.problems.add(f"{self.origin}: {problem}")
            return []
        problems_before = len(self.problems.lines)
        general = self._level(raw.get("general", {}), "general", f"{self.origin}: general")
        datasets = []
        for index, raw_dataset in enumerate(self._list(raw["datasets"], f"{self.origin}: datasets")):
            where = f"{self.origin}: datasets[{index}]"
            raw_subsets = None
            raw_values = raw_dataset
            if isinstance(raw_dataset, dict):
                raw_subsets = raw_dataset.get("subsets")
                raw_values = {key: value for key, value in raw_dataset.items() if key != "subsets"}
                if raw_subsets is None and isinstance(raw_values.get("subset"), dict | list):
                    self.problems.add(f"{where}.subset is not a key of a dataset; did you mean subsets?")
                    continue
            values = {**general, **self._level(raw_values, "a dataset", where)}
            subsets = self._subsets(raw_subsets, values, f"{where}.subsets")
            dataset_values = {key: value for key, value in values.items() if key in DATASET_KEYS}
            if len(self.problems.lines) == problems_before:  # else values may be missing, and nothing is used anyway
                dataset = Dataset(subsets, **{"resolution": (0, 0), **dataset_values})
                datasets.append((dataset, frozenset(dataset_values)))
                if all(subset.is_reg for subset in subsets):
                    fix = "Fix: add a subset without is_reg."
                    self.problems.add(f"{where}: all subsets are regularisation images. {fix}")
        return datasets

    def _subsets(self, raw: Any, inherited: Mapping[str, Any], where: str) -> tuple[Subset, ...]:
        """`inherited`: the values of the dataset and of `general`."""
        subsets = []
        for index, raw_subset in enumerate(self._list(raw, where)):
            place = f"{where}[{index}]"
            own = self._level(raw_subset, "a subset", place)
            own = self._with_folder(own, place)
            subsets.append(_subset(inherited, own, place, self.problems))
        return tuple(subsets)

    def _list(self, raw: Any, where: str) -> list[Any]:
        if isinstance(raw, list) and raw:
            return raw
        self.problems.add(
            f"{where}: a list with at least one object is needed ({{}} takes its images from DATASET_NAME)."
        )
        return []

    def _level(self, raw: Any, level: str, where: str) -> dict[str, Any]:
        """The checked values of one object; `level` is a key of LEVELS. A null counts as not set."""
        if not isinstance(raw, dict):
            self.problems.add(f"{where}: {show(raw)} is not an object.")
            return {}
        keys = LEVELS[level]
        values = {}
        for name, value in raw.items():
            if name not in keys:
                other_levels = [other for other, known in LEVELS.items() if name in known]
                fix = f"it belongs to {' or '.join(other_levels)}." if other_levels else suggestion(name, keys)
                self.problems.add(f"{where}.{name} is not a key of {level}; {fix}")
            elif value is not None:
                try:
                    values[name] = keys[name].read(value)
                    if name in PATH_KEYS:
                        _refuse_escapes(values[name])
                except ValueError as problem:
                    self.problems.add(f"{where}.{name}: {problem}.")
        return values

    def _with_folder(self, own: dict[str, Any], where: str) -> dict[str, Any]:
        """`own` with an image_dir that is only there beside the document, as people expect of a path in a file.

        A relative path counts from where the program starts.
        """
        name = own.get("image_dir")
        if not name or self.beside is None or is_folder(name) or is_file(name):
            return own
        path = Path(name)
        if path.is_absolute() or name.startswith("~") or "://" in name:
            return own
        beside = str(self.beside / path)
        if not is_folder(beside) and not is_file(beside):
            return own
        self.notes.append(f"{where}.image_dir {name}: it is not in {Path.cwd()}, but beside the file: {beside}")
        return {**own, "image_dir": beside}


def _refuse_escapes(path: str) -> None:
    """Raises ValueError for a path in which `\\n` or `\\t` became a line break or a tab."""
    if any(ord(letter) < 32 for letter in path):
        raise ValueError(
            f"{show(path)} has a line break or a tab: backslashes begin an escape here. Fix: write / instead, and "
            "mount the folder where Kiln runs"
        )


# ---- a subset


def _subset(inherited: Mapping[str, Any], own: Mapping[str, Any], where: str, problems: Problems) -> Subset:
    """One subset from its own values and those that it inherits."""
    merged = {**inherited, **own}
    if not merged.get("caption_separator", ","):
        problems.add(f'{where}.caption_separator is empty. Fix: "," for example.')
    if problem := _problem_of_extension(merged.get("caption_extension", ".txt")):
        problems.add(f"{where}.caption_extension {show(merged['caption_extension'])} {problem}. Fix: .txt for example.")
    values = {name: value for name, value in merged.items() if name in SHARED_KEYS or name in OWN_KEYS}
    if "class_prompt" in own:
        if not values.setdefault("is_reg", True):
            problems.add(f"{where}: images of class_prompt are regularisation images. Fix: remove is_reg.")
        # Prefix and suffix that are inherited describe the user's own images, such as a trigger word that the class
        # must not learn.
        values["caption_prefix"] = own.get("caption_prefix")
        values["caption_suffix"] = own.get("caption_suffix")
        values["class_tokens"] = own["class_prompt"]
    if values.get("is_reg") and own.get("trigger_word"):
        problems.add(f"{where}: regularisation images get no trigger word. Fix: remove trigger_word.")
    return Subset(_source(own, where, problems), repeats_chosen="num_repeats" in own, **values)


def _problem_of_extension(extension: str) -> str | None:
    """Why captions cannot be in files with this extension, as the rest of a sentence.

    CAPTION_WRITE writes files of this name: with the extension of an image, it would replace the image.
    """
    if not extension.startswith("."):
        return "has no dot"
    if not re.fullmatch(r"(\.[^./\\\x00-\x1f]+)+", extension):
        return "is no extension of a file"
    last = f".{extension.rpartition('.')[2]}"
    if any(pattern.fullmatch(last) for pattern in (formats.READABLE, formats.UNREADABLE, formats.VIDEO)):
        return "is that of images or videos, and captions are text"
    if last.lower() in (FILE, *PICKLES):
        return "is that of models, and captions are text"
    return None


def _source(own: Mapping[str, Any], where: str, problems: Problems) -> Source:
    """Where a subset's images come from; FROM_DATASET_NAME, with a line in `problems`, if its keys do not fit."""
    hub_values = {name: value for name, value in own.items() if name in HUB_KEYS}
    columns = {name: value for name, value in own.items() if name in COLUMN_KEYS}
    try:
        if "class_prompt" in own or "num_class_images" in own:
            return _generated_source(own, {**hub_values, **columns})
        if "image_dir" in own:
            others = [name for name in ("dataset", *hub_values) if name in own]
            if others:
                raise ValueError(f"image_dir does not go together with {others[-1]}")
            return replace(_named_source(own["image_dir"], is_path=True), **columns)
        if "dataset" in own:
            found = Source("hub", own["dataset"])
            if not HUB_ID.fullmatch(own["dataset"]):  # an existing folder of the same name does not count
                found = _named_source(own["dataset"], is_path=False)
            if found.kind != "hub":
                raise ValueError(f"dataset {show(own['dataset'])} is not a Hub dataset like owner/name. Fix: image_dir")
            if found.revision and hub_values.get("revision", found.revision) != found.revision:
                raise ValueError(f"dataset names the revision {found.revision}, and revision another one")
            return Source("hub", found.location, **{"split": "", "revision": found.revision, **hub_values, **columns})
        return Source("", "", **{"split": "", **hub_values, **columns})
    except ValueError as problem:
        problems.add(f"{where}: {problem}.")
        return FROM_DATASET_NAME


def _named_source(name: str, *, is_path: bool) -> Source:
    """The source that `image_dir` (a path) or `dataset` names. Raises ValueError."""
    place = classify(name, hub=not is_path)
    if place.kind == "hub" and is_path:
        raise ValueError(f"image_dir {show(name)} is a dataset of the Hub. Fix: dataset {show(place.location)}")
    return Source(place.kind, place.location, place.revision)


def _generated_source(own: Mapping[str, Any], hub_values: Mapping[str, Any]) -> Source:
    """The class images that the base model generates before training. Raises ValueError."""
    for name in (*LOCATION_KEYS, *hub_values, *NOT_WITH_CLASS_PROMPT):
        if name in own:
            raise ValueError(f"{name} does not go together with class_prompt: the model generates these images")
    if not own.get("class_prompt"):
        raise ValueError("num_class_images needs a class_prompt, a dog for example")
    return Source("generated", own["class_prompt"], count=own.get("num_class_images", DEFAULT_CLASS_IMAGES))
