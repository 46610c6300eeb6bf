"""Which columns of a dataset hold the images and the captions.

Columns are `datasets`' features by name. A column inside another has both names, joined by a dot: `json.caption`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from trainer.data.caption_files.formats import CAPTION_NAMES, LABELS, MORE_CAPTION_NAMES, NEAR_CAPTION, TAGS, normal
from trainer.spec.errors import SettingsError
from trainer.spec.values import some

# Usual names of columns, in order of preference; txt: a caption file in a webdataset.
CAPTIONS = (*CAPTION_NAMES, *MORE_CAPTION_NAMES, "txt", TAGS, *LABELS)
MOST_COLUMNS = 40  # in one message: a table may have hundreds
ADDRESS = re.compile(r"ur[li]|link|http", re.IGNORECASE)


def flatten(features: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every column and, after it, the columns inside it."""
    for name, feature in features.items():
        yield prefix + name, feature
        if isinstance(feature, dict) and not is_image(feature):
            yield from flatten(feature, f"{prefix}{name}.")


def value_of(row: dict[str, Any], column: str) -> Any:
    """The value of a column, which may be inside another; None if the row lacks it."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def find_image_column(variable: str, features: dict[str, Any], asked: str | None) -> str:
    """The column of images: the one asked for, or the only one. Raises SettingsError that lists the columns."""
    known = dict(flatten(features))
    fit = [name for name, feature in known.items() if is_image(feature)]
    lists = [name for name, feature in known.items() if is_image(_item(feature))]
    columns = some([*known], most=MOST_COLUMNS)
    if asked is not None:
        if asked not in known:
            raise SettingsError(f"IMAGE_COLUMN={asked}: {variable} has no such column, only {columns}.")
        is_bytes = getattr(known[asked], "dtype", "") in ("binary", "large_binary")
        if asked not in fit and asked not in lists and not is_bytes:
            raise SettingsError(
                f"IMAGE_COLUMN={asked}: that column of {variable} holds no images (columns: {columns})."
            )
        return asked
    fit = fit or lists
    if len(fit) != 1:
        number = "no column of images"
        if fit:
            number = f"several columns of images ({', '.join(fit)})"
        hint = ""
        if not fit and any(ADDRESS.search(name) for name in known):
            hint = " Images that it only names by their addresses are not fetched: download them first, into a folder."
        raise SettingsError(f"{variable} has {number}. Choose one with IMAGE_COLUMN; the columns are {columns}.{hint}")
    return fit[0]


def find_caption_column(variable: str, features: dict[str, Any], asked: str | None, images: str) -> str | None:
    """The column of captions: the one asked for, or one with a common name, or None.

    Columns inside others count after all others. Raises SettingsError with the columns if it does not exist, or if
    several could be meant.
    """
    known = {name: feature for name, feature in flatten(features) if name != images}
    if asked is not None:
        if asked not in known:
            columns = some([*known], most=MOST_COLUMNS) or "images"
            raise SettingsError(f"CAPTION_COLUMN={asked}: {variable} has no such column, only {columns}.")
        if not is_text(known[asked]):
            raise SettingsError(f"CAPTION_COLUMN={asked}: that column of {variable} holds no text.")
        return asked
    fit = [name for name, feature in known.items() if is_text(feature) and not name.startswith("__")]
    for inside in (False, True):
        found = _usual(variable, [name for name in fit if (name not in features) == inside])
        if found is not None:
            return found
    return None


def _usual(variable: str, fit: list[str]) -> str | None:
    """The column with the most usual name for captions; the last part of its name counts."""
    for usual in CAPTIONS:
        for name in fit:
            if normal(name.rpartition(".")[2]) == usual:
                return name
    near = [name for name in fit if NEAR_CAPTION.search(name.rpartition(".")[2])]
    if len(near) > 1:
        raise SettingsError(f"{variable} has several columns of captions. Choose CAPTION_COLUMN: {', '.join(near)}.")
    return near[0] if near else None


def texts(features: dict[str, Any], images: str) -> list[str]:
    """The columns that CAPTION_COLUMN could name."""
    columns = [name for name, feature in flatten(features) if name != images and is_text(feature)]
    return [name for name in columns if not name.startswith("__")]


def unused_columns(features: dict[str, Any], used: Collection[str | None]) -> list[str]:
    """The columns that take no part; of a column with others inside, these."""
    unused = []
    for name, feature in flatten(features):
        has_others = isinstance(feature, dict) and not is_image(feature)
        if name not in used and not has_others and not name.startswith("__"):
            unused.append(name)
    return unused


def is_image(feature: Any) -> bool:
    """Whether a column holds one image a row."""
    if isinstance(feature, dict):  # another library wrote it: bytes and path, without the image type
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image"


def _item(feature: Any) -> Any:
    """What a column of lists has in its lists; None for other columns."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    return getattr(feature, "feature", None)


def is_text(feature: Any) -> bool:
    """Whether a column holds texts, lists of texts, or labels with names."""
    inner = _item(feature)
    if inner is None:
        inner = feature
    return hasattr(inner, "names") or getattr(inner, "dtype", "") in ("string", "large_string")


def label_names(features: dict[str, Any], column: str) -> list[str] | None:
    """The names of a column of class labels, by number; None for other columns."""
    feature = dict(flatten(features))[column]
    inner = _item(feature)
    names = getattr(feature if inner is None else inner, "names", None)
    return list(names) if names else None
