"""dataset.json and prompts.txt → frozen records. Nothing is guessed; a bad key or line is named with its place.

Both are given as a path, an http(s) URL or inline JSON, and may be TOML too.
"""

from __future__ import annotations

import http.client
import re
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from entrypoint.dataset_config.prompts import parse_tree
from entrypoint.settings.checks import absolute, is_file, is_folder, load_json, suggestion
from trainer.spec.errors import UnreachableError
from trainer.spec.plan import Dataset, Source, Subset
from trainer.spec.prompts import PromptRequest, parse_lines
from trainer.spec.values import Key, Problems, show

PACKAGED = Path(__file__).resolve().parents[2]  # where this program's own dataset.json and prompts.txt lie
LARGEST = 2**20  # bytes of dataset.json or prompts.txt
SECONDS = 10.0  # for a URL
TRANSIENT = (408, 425, 429)  # answers that another try may change, as may 500 and above

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
OTHER_ARCHIVES = (".rar", ".7z", ".zst", ".gz", ".bz2", ".xz", ".lz4")
HUB_ID = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)
UNNAMED = Source(kind="", location="", split="")  # a subset that takes DATASET_NAME

_SIDE = Key("integer", 16, 16384)
_RATE = Key("number", 0, 1)
_COUNT = Key("integer", 0, 10**6)
_TEXT, _FLAG = Key("text"), Key("boolean")
DATASET_KEYS = {  # of a dataset; `general` gives defaults
    "resolution": Key("size", 16, 8192),
    "batch_size": Key("integer", 1, 4096),
    "enable_bucket": _FLAG,
    "min_bucket_reso": _SIDE,
    "max_bucket_reso": _SIDE,
    "bucket_reso_steps": Key("integer", 1, 2048),
    "bucket_no_upscale": _FLAG,
    "validation_split": Key("number", 0, 0.99),
    "validation_seed": Key("integer", 0, 2**32 - 1),
}
SHARED_KEYS = {  # of a subset; its dataset and `general` give defaults
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
}
HUB_KEYS = {"revision": _TEXT, "split": _TEXT, "image_column": _TEXT, "caption_column": _TEXT}
OWN_KEYS = {"is_reg": _FLAG, "alpha_mask": _FLAG, "metadata_file": _TEXT, "conditioning_data_dir": _TEXT}
CLASS_KEYS = {"class_prompt": _TEXT, "num_class_images": Key("integer", 1, 100_000)}  # pictures that the model draws
CLASS_IMAGES = 100
MADE_BY_HAND = ("class_tokens", "alpha_mask", "metadata_file", "conditioning_data_dir")  # which drawn pictures lack
SUBSET_KEYS = {"image_dir": _TEXT, "dataset": _TEXT, **HUB_KEYS, **CLASS_KEYS, **OWN_KEYS}  # of a subset alone
LEVELS = {
    "general": {**DATASET_KEYS, **SHARED_KEYS},
    "a dataset": {**DATASET_KEYS, **SHARED_KEYS},
    "a subset": {**SHARED_KEYS, **SUBSET_KEYS},
}


@dataclass(frozen=True)
class Manifest:
    """What dataset.json and prompts.txt say. `named` is parallel to `datasets`."""

    datasets: tuple[Dataset, ...]  # the resolution is (0, 0) where none is said, a subset's source may be UNNAMED
    named: tuple[frozenset[str], ...]  # the keys of DATASET_KEYS that are said for each dataset
    prompts: tuple[PromptRequest, ...]
    datasets_packaged: bool  # they are this program's own, not the user's
    prompts_packaged: bool
    origin: str = "dataset.json"  # for messages


def read_manifest(
    dataset_config: str | None,
    sample_prompts: str | None,
    *,
    open_url: Callable[..., Any] = urllib.request.urlopen,
    packaged: Path = PACKAGED,
) -> Manifest:
    """What DATASET_CONFIG and SAMPLE_PROMPTS name, or this program's own files.

    Raises SettingsError with a line for each problem in both, UnreachableError if a URL does not answer.
    """
    problems = Problems()
    config, prompts = dataset_config or "", sample_prompts or ""
    origin = "dataset.json"
    tree: Any = {"datasets": [{"subsets": [{}]}]}
    if config or (packaged / "dataset.json").is_file():
        origin = _label(config, "DATASET_CONFIG") if config else origin
        text, form = _read(config or str(packaged / "dataset.json"), "DATASET_CONFIG", problems, open_url=open_url)
        tree = _tree(text, form=form, origin=origin, problems=problems)
    datasets = _parse_datasets(tree, origin, problems) if tree is not None else []
    asked: tuple[PromptRequest, ...] = ()
    if prompts or (packaged / "prompts.txt").is_file():
        place = _label(prompts, "SAMPLE_PROMPTS") if prompts else "prompts.txt"
        text, form = _read(prompts or str(packaged / "prompts.txt"), "SAMPLE_PROMPTS", problems, open_url=open_url)
        if form == "txt":
            asked = parse_lines(text or "", origin=place, problems=problems)
        elif (listed := _tree(text, form=form, origin=place, problems=problems)) is not None:
            asked = parse_tree(listed, origin=place, problems=problems)
    problems.raise_if_any("The dataset's description or the prompts cannot be used")
    return Manifest(
        datasets=tuple(dataset for dataset, _ in datasets),
        named=tuple(named for _, named in datasets),
        prompts=asked,
        datasets_packaged=not config,
        prompts_packaged=not prompts,
        origin=origin,
    )


# ---- a path, a URL, or the text itself


def _label(value: str, variable: str) -> str:
    """How messages call it. What follows ? in a URL may be a key to it."""
    return variable if value[:1] in "{[" else f"{variable} {value.split('?')[0]}"


def _read(value: str, variable: str, problems: Problems, *, open_url: Callable[..., Any]) -> tuple[str | None, str]:
    """The text (None with a problem said), and json, toml or txt."""
    if value[:1] in ("{", "["):
        return value, "json"
    try:
        url = urlsplit(value)
        remote = url.scheme in ("http", "https")
        suffix = Path(url.path if remote else value).suffix.lower()
        form = {".json": "json", ".toml": "toml"}.get(suffix, "json" if variable == "DATASET_CONFIG" else "txt")
        data = _download(value, open_url) if remote else _load(value)
        if len(data) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST // 2**20} MiB")
        return data.decode("utf-8-sig"), form
    except UnicodeDecodeError:
        problems.add(f"{_label(value, variable)}: it is not UTF-8 text.")
    except (ValueError, OSError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        fix = "give the path of a file, an http(s) URL, or the JSON itself"
        problems.add(f"{_label(value, variable)}: it cannot be read: {reason}. Fix: {fix}.")
    return None, "json"


def _load(path: str) -> bytes:
    if "://" in path:
        raise ValueError("only http and https URLs can be read")
    with Path(absolute(path)).open("rb") as file:
        return file.read(LARGEST + 1)


def _download(url: str, open_url: Callable[..., Any]) -> bytes:
    """Up to LARGEST bytes, and one more if there are more. UnreachableError if it is worth another try."""
    deadline, data = time.monotonic() + SECONDS, b""
    try:
        with open_url(url, timeout=SECONDS) as response:
            while len(data) <= LARGEST and (piece := response.read(2**16)):
                data += piece
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it takes longer than {SECONDS:.0f} s")
        return data
    except http.client.InvalidURL as problem:
        raise ValueError("it is not a URL") from problem
    except urllib.error.HTTPError as problem:
        if problem.code < 500 and problem.code not in TRANSIENT:
            raise ValueError(f"the server answers {problem.code} {problem.reason}") from problem
        raise UnreachableError(f"{url.split('?')[0]}: the server answers {problem.code}.") from problem
    except (OSError, http.client.HTTPException) as problem:
        raise UnreachableError(f"{url.split('?')[0]} cannot be reached: {problem}.") from problem


def _tree(text: str | None, *, form: str, origin: str, problems: Problems) -> Any:
    """The parsed text; None with a problem said."""
    if text is None:
        return None
    try:
        return load_json(text) if form == "json" else tomllib.loads(text)
    except RecursionError:
        problems.add(f"{origin}: it is nested too deeply.")
    except ValueError as problem:
        problems.add(f"{origin}: it is not {form.upper()}: {problem}.")
    return None


# ---- the schema


def _parse_datasets(raw: Any, origin: str, problems: Problems) -> list[tuple[Dataset, frozenset[str]]]:
    """Each dataset with the keys that are said for it. Look-up: subset, dataset, general, default."""
    if not isinstance(raw, dict) or raw.keys() - {"general", "datasets"} or "datasets" not in raw:
        strange = sorted(raw.keys() - {"general", "datasets"}) if isinstance(raw, dict) else []
        said = f"the key {show(strange[0])} is not known; " if strange else ""
        problems.add(f'{origin}: {said}an object {{"general": {{...}}, "datasets": [...]}} is needed.')
        return []
    before = len(problems.lines)
    general = _level(raw.get("general", {}), "general", f"{origin}: general", problems)
    found = []
    for i, item in enumerate(_listed(raw["datasets"], f"{origin}: datasets", problems)):
        where = f"{origin}: datasets[{i}]"
        subsets = item.get("subsets") if isinstance(item, dict) else None
        bare = {k: v for k, v in item.items() if k != "subsets"} if isinstance(item, dict) else item
        dataset = {**general, **_level(bare, "a dataset", where, problems)}
        made = []
        for j, each in enumerate(_listed(subsets, f"{where}.subsets", problems)):
            place = f"{where}.subsets[{j}]"
            made.append(_subset(dataset, _level(each, "a subset", place, problems), place, problems))
        values = {key: value for key, value in dataset.items() if key in DATASET_KEYS}
        if len(problems.lines) == before:
            found.append((Dataset(tuple(made), **{"resolution": (0, 0), **values}), frozenset(values)))
            if all(subset.is_reg for subset in made):
                problems.add(f"{where}: all subsets are regularisation pictures. Fix: one without is_reg.")
    return found


def _listed(raw: Any, where: str, problems: Problems) -> list[Any]:
    if isinstance(raw, list) and raw:
        return raw
    problems.add(f"{where}: a list with at least one object is needed ({{}} takes its pictures from DATASET_NAME).")
    return []


def _level(raw: Any, level: str, where: str, problems: Problems) -> dict[str, Any]:
    """The checked values of one object. A null is as good as nothing."""
    if not isinstance(raw, dict):
        problems.add(f"{where}: {show(raw)} is not an object.")
        return {}
    known, found = LEVELS[level], {}
    for name, value in raw.items():
        if name not in known:
            homes = [home for home, keys in LEVELS.items() if name in keys]
            fix = f"it belongs to {' or '.join(homes)}." if homes else suggestion(name, known)
            problems.add(f"{where}.{name} is no key of {level}; {fix}")
        elif value is not None:
            try:
                found[name] = known[name].read(value)
            except ValueError as problem:
                problems.add(f"{where}.{name}: {problem}.")
    return found


def _subset(dataset: Mapping[str, Any], own: Mapping[str, Any], where: str, problems: Problems) -> Subset:
    merged = {**dataset, **own}
    if not merged.get("caption_separator", ","):
        problems.add(f'{where}.caption_separator is empty. Fix: "," for example.')
    if not merged.get("caption_extension", ".").startswith("."):
        problems.add(
            f"{where}.caption_extension {show(merged['caption_extension'])} has no dot. Fix: .txt for example."
        )
    kept = {name: value for name, value in merged.items() if name in SHARED_KEYS or name in OWN_KEYS}
    if "class_prompt" in own:
        if not kept.setdefault("is_reg", True):
            problems.add(f"{where}: pictures of class_prompt are regularisation pictures. Fix: remove is_reg.")
        # What the datasets above say of captions is said of the user's own pictures.
        plain = {name: own.get(name) for name in ("caption_prefix", "caption_suffix")}
        kept |= {**plain, "class_tokens": own["class_prompt"]}
    return Subset(_subset_source(own, where, problems), **kept)


def _subset_source(own: Mapping[str, Any], where: str, problems: Problems) -> Source:
    hub = {name: value for name, value in own.items() if name in HUB_KEYS}
    try:
        if "class_prompt" in own or "num_class_images" in own:
            if wrong := [name for name in ("image_dir", "dataset", *hub, *MADE_BY_HAND) if name in own]:
                raise ValueError(f"{wrong[0]} does not go together with class_prompt: the model draws these pictures")
            if not own.get("class_prompt"):
                raise ValueError("num_class_images needs a class_prompt to draw from, a dog for example")
            return Source("generated", own["class_prompt"], count=own.get("num_class_images", CLASS_IMAGES))
        if "image_dir" in own and ("dataset" in own or hub):
            raise ValueError(f"image_dir does not go together with {['dataset', *hub][-1]}")
        if "image_dir" in own:
            return Source(*classify(own["image_dir"], hub=False))
        if "dataset" in own:
            if not HUB_ID.fullmatch(own["dataset"]):
                raise ValueError(f"dataset {show(own['dataset'])} is not a Hub dataset like org/name")
            return Source("hub", own["dataset"], **{"split": "", **hub})
        return Source("", "", **{"split": "", **hub})
    except ValueError as problem:
        problems.add(f"{where}: {problem}.")
        return UNNAMED


def classify(location: str, *, hub: bool = True) -> tuple[str, str]:
    """What DATASET_NAME or image_dir names: folder, archive or hub; and the absolute path, URL or Hub id.

    Without `hub`, what is not there yet is a folder. Raises ValueError for what is none of them.
    """
    lower = location.lower()
    if not location:
        raise ValueError("an empty name. Allowed: a Hub dataset (org/name), a folder, an archive or its URL")
    if "://" in location:
        return "archive", _archive_url(location)
    if is_folder(location):
        return "folder", absolute(location)
    if lower.endswith(ARCHIVES):
        return "archive", absolute(location)
    if lower.endswith(OTHER_ARCHIVES):
        raise ValueError(f"{show(location)} is of a kind that is not read. Allowed: {', '.join(ARCHIVES)}")
    if is_file(location):
        raise ValueError(f"{show(location)} is a file, but no archive. Allowed: a folder, or {', '.join(ARCHIVES)}")
    if not hub or location.startswith(("/", ".", "~")):
        return "folder", absolute(location)
    if HUB_ID.fullmatch(location):
        return "hub", location
    raise ValueError(f"{show(location)} is neither a Hub dataset (org/name), a folder, an archive nor a URL")


def _archive_url(location: str) -> str:
    url = urlsplit(location)
    path = url.path.lower()
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"{show(location.split('@')[-1])} cannot be downloaded. Allowed: http and https URLs")
    if url.username or url.password:
        raise ValueError("a URL with a password in it would end up in plan.json. Fix: download the archive yourself")
    if re.fullmatch(r"/datasets/[^/]+/[^/]+/?", url.path) and url.hostname.endswith(("huggingface.co", "hf.co")):
        raise ValueError(f"{show(location)} is a page. Fix: name the dataset, {url.path.strip('/').split('/', 1)[1]}")
    if path.endswith(OTHER_ARCHIVES) and not path.endswith(ARCHIVES):
        raise ValueError(f"{show(location)} is of a kind that is not read. Allowed: {', '.join(ARCHIVES)}")
    return location
