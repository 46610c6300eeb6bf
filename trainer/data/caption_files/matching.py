"""Which image a row of a metadata file names.

Rows were often written on another machine, before the images were moved or converted. A name counts as that of an
image only if no other image could be meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from trainer.data.caption_files.sidecars import folded
from trainer.data.folders.formats import READABLE, UNREADABLE

ELSEWHERE = re.compile(r"[A-Za-z]:/|[A-Za-z][A-Za-z0-9+.-]*://")  # a Windows drive, or a URL


class ImageNames:
    """The images that the rows of one metadata file may name.

    `names` are relative to `folder`, which has the metadata file, with /. `aliases` are further names with the image
    that each may mean; an image's own name wins over them.
    """

    def __init__(self, names: Iterable[str], *, folder: Path, aliases: Iterable[tuple[str, str]] = ()) -> None:
        self._folder = folder
        self._own = dict.fromkeys(names)
        self._aliases = [(alias, image) for alias, image in dict.fromkeys(aliases) if alias not in self._own]
        # Whether a whole name can mean this image alone, and is no other one without its suffix (a.png, a.png.jpg).
        self._is_plain = not self._aliases and not any(
            _stem(name) in self._own for name in self._own if _stem(name) != name
        )

    @cached_property
    def _keys(self) -> _Keys:
        """Made where a row does not have the whole name of an image: for a million images it is a gigabyte."""
        keys = _Keys()
        for name, image in [*((name, name) for name in self._own), *self._aliases]:
            for key in dict.fromkeys((name, _stem(name))):
                keys.exact.setdefault(key, []).append(image)
                keys.loose.setdefault(folded(key), []).append(image)
                keys.last.setdefault(folded(_last_part(key)), []).append(image)
        return keys

    def find(self, entry: str) -> list[str]:
        """The images that `entry` names: one; all of one stem, if it has no suffix; or none.

        Of a path on another machine the longest end that is an image here counts, and of a relative path also what is
        left without the names of the folders that the file is in (`train/a.png` in `train/metadata.csv`).
        """
        path, anywhere = self._normal(entry)
        images = self._look_up(path)
        if images:
            return images
        parts = PurePosixPath(path).parts
        here = [folded(part) for part in self._folder.parts]
        for dropped in range(1, len(parts)):
            if images:
                break
            is_here = here[-dropped:] == [folded(part) for part in parts[:dropped]]
            if anywhere or is_here:
                images = self._look_up("/".join(parts[dropped:]))
        return images

    def find_by_last_part(self, entry: str) -> list[str]:
        """The only image in any folder with the same last part of the name, for files of which no row matches."""
        path, _ = self._normal(entry)
        last = _last_part(path)
        by_last = self._keys.last
        return _only(by_last.get(folded(last))) or _only(by_last.get(folded(_stem(last))))

    def _normal(self, entry: str) -> tuple[str, bool]:
        """The entry as a relative path with /, and whether it is one of another machine."""
        text = entry.strip().replace("\\", "/")
        if "/" not in text:
            return text, False
        if elsewhere := ELSEWHERE.match(text):
            if "://" in elsewhere.group():
                text = re.split(r"[?#]", text)[0]
            return str(PurePosixPath(text[elsewhere.end() :])).lstrip("/"), True
        path = PurePosixPath(text)
        if not path.is_absolute():
            return str(path), False
        for folder in (self._folder, self._folder.resolve()):
            if path.is_relative_to(folder):
                return str(path.relative_to(folder)), False
        return str(path).lstrip("/"), True

    def _look_up(self, path: str) -> list[str]:
        """The images by whole name; by stem; by a name that differs in case; by one that differs in its suffix."""
        if self._is_plain and path in self._own:
            return [path]
        keys = self._keys
        if path in keys.exact:
            return keys.exact[path]
        stem = _stem(path)
        return _only(keys.loose.get(folded(path))) or (_only(keys.loose.get(folded(stem))) if stem != path else [])


@dataclass(frozen=True)
class _Keys:
    """What may name an image → the images that it may mean."""

    exact: dict[str, list[str]] = field(default_factory=dict)  # whole names, and names without suffix
    loose: dict[str, list[str]] = field(default_factory=dict)  # the same, folded
    last: dict[str, list[str]] = field(default_factory=dict)  # the last part of the name, likewise folded


def _stem(name: str) -> str:
    """`a/b.png` → `a/b`; `a/b.v2`, whose end is no suffix of an image, stays."""
    suffix = "." + name.rpartition(".")[2]
    if READABLE.fullmatch(suffix) or UNREADABLE.fullmatch(suffix):
        return name[: -len(suffix)]
    return name


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]


def _only(images: list[str] | None) -> list[str]:
    """The images, if they are one."""
    if images is not None and len(set(images)) == 1:
        return images[:1]
    return []
