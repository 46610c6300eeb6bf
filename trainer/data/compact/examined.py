"""What the scan has read from the files of images: some 60 bytes for each, until the records of a subset are made."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from trainer.data.compact.columns import Digests, FewValues
from trainer.data.hygiene.faces import Face
from trainer.data.hygiene.looks import Looks

NO_DIGEST = "0" * 64
_ALPHA, _LOOKED, _HASHED, _BARS = 1, 2, 4, 8  # bits of a flag


@dataclass(frozen=True, slots=True)
class FileInfo:
    """From a file's bytes. Upright width and height in pixels."""

    sha256: str
    width: int
    height: int
    has_alpha: bool
    looks: Looks | None

    def to_row(self) -> list[Any]:
        """As JSON: what `from_row` reads."""
        looks = None if self.looks is None else list(self.looks)
        return [self.sha256, self.width, self.height, self.has_alpha, looks]

    @staticmethod
    def from_row(row: list[Any]) -> FileInfo:
        """Raises ValueError, TypeError for another row."""
        sha256, width, height, has_alpha, looks = row
        seen = None
        if looks is not None:
            number, sharpness, has_bars, faces = looks
            seen = Looks(number, sharpness, has_bars, tuple(tuple(face) for face in faces))
        return FileInfo(sha256, width, height, has_alpha, seen)


class Examined:
    """For each file what was found in it, or the reason why it is unusable, in the order in which they are added."""

    def __init__(self) -> None:
        self._sha256 = Digests()
        self._sizes = array("I")  # width and height in turn
        self._flags = bytearray()
        self._hashes = array("Q")
        self._sharpness = array("d")  # not a number: nothing in the image has contrast
        self._faces: dict[int, tuple[Face, ...]] = {}
        self._problems: dict[int, str] = {}

    def append(self, found: FileInfo | str) -> None:
        if isinstance(found, str):
            self._problems[len(self)] = found
            found = FileInfo(NO_DIGEST, 0, 0, has_alpha=False, looks=None)
        looks = found.looks
        flag = _ALPHA if found.has_alpha else 0
        if looks is not None:
            flag |= _LOOKED | (_HASHED if looks.hash is not None else 0) | (_BARS if looks.has_bars else 0)
            if looks.faces:
                self._faces[len(self)] = looks.faces
        self._hashes.append((looks.hash if looks is not None else None) or 0)
        sharpness = looks.sharpness if looks is not None else None
        self._sharpness.append(math.nan if sharpness is None else sharpness)
        self._sha256.append(found.sha256)
        self._sizes.extend((found.width, found.height))
        self._flags.append(flag)

    def __len__(self) -> int:
        return len(self._flags)

    def __getitem__(self, place: int) -> FileInfo | str:
        if place in self._problems:
            return self._problems[place]
        width, height = self._sizes[2 * place], self._sizes[2 * place + 1]
        has_alpha = bool(self._flags[place] & _ALPHA)
        return FileInfo(self._sha256[place], width, height, has_alpha, self.looks(place))

    def looks(self, place: int) -> Looks | None:
        flag = self._flags[place]
        if not flag & _LOOKED:
            return None
        return Looks(
            self._hashes[place] if flag & _HASHED else None,
            None if math.isnan(self._sharpness[place]) else self._sharpness[place],
            bool(flag & _BARS),
            self._faces.get(place, ()),
        )


class Files(Sequence[Path]):
    """The files that a scan reads, each once, in the order in which they are added."""

    def __init__(self) -> None:
        self._places: dict[str, dict[str, int]] = {}  # folder → name in it → place
        self._folders: FewValues[str] = FewValues()
        self._names: list[str] = []

    def add(self, file: str) -> None:
        folder, _, name = file.rpartition("/")
        names = self._places.setdefault(folder, {})
        if name not in names:
            names[name] = len(self)
            self._folders.append(folder)
            self._names.append(name)

    def place(self, file: str) -> int:
        folder, _, name = file.rpartition("/")
        return self._places[folder][name]

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, place: int) -> Path: ...
    @overload
    def __getitem__(self, place: slice) -> list[Path]: ...
    def __getitem__(self, place: int | slice) -> Path | list[Path]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        return Path(f"{self._folders[place]}/{self._names[place]}")


@dataclass(frozen=True)
class ScannedFiles:
    """The files of a scan, and what is in each."""

    files: Files
    examined: Examined

    def info(self, file: str) -> FileInfo | str:
        """Of the file, or the reason why it is unusable."""
        return self.examined[self.files.place(file)]

    def looks(self, root: Path) -> Mapping[str, Looks | None]:
        """The looks of the images below `root`, by their names relative to it."""
        return _LooksBelow(self, str(root))


class _LooksBelow(Mapping[str, Looks | None]):
    def __init__(self, found: ScannedFiles, root: str) -> None:
        self._found = found
        self._root = root

    def __getitem__(self, name: str) -> Looks | None:
        return self._found.examined.looks(self._found.files.place(f"{self._root}/{name}"))

    def __iter__(self) -> Iterator[str]:
        for file in self._found.files:
            yield str(file).removeprefix(f"{self._root}/")

    def __len__(self) -> int:
        return len(self._found.files)
