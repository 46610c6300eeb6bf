"""The images of a scan in columns: some 100 bytes for each, and its name and caption.

It is a sequence of `ImageRecord`s, each made when it is asked for. Two records of one place are equal, and not the same
object.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

from trainer.data.compact.columns import Digests, FewValues, Texts
from trainer.data.records import ImageRecord


class ImageTable(Sequence[ImageRecord]):
    """Images in the order in which they are added."""

    def __init__(self, images: Iterable[ImageRecord] = ()) -> None:
        self._names = Texts()
        # Of the file: the folder that its name is relative to; or all of its path, and False.
        self._folders: FewValues[tuple[str, bool]] = FewValues()
        self._sha256 = Digests()
        self._widths = array("I")
        self._heights = array("I")
        # Everything that many images have alike: dataset, subset, alpha, the convention of their folder, encoding.
        self._common: FewValues[tuple[int, int, bool, int | None, str | None, str, str]] = FewValues()
        self._captions = Texts()
        self._caption_files = Texts()
        self._spans = array("Q")  # first byte and number of bytes in turn; no bytes: the file is the image
        self._masks: dict[int, tuple[str | None, str | None]] = {}  # by place: file and hash, where there is one
        self.extend(images)

    def extend(self, images: Iterable[ImageRecord]) -> None:
        for image in images:
            self.append(image)

    def append(self, image: ImageRecord) -> None:
        if image.mask_file is not None or image.mask_sha256 is not None:
            self._masks[len(self)] = (str(image.mask_file) if image.mask_file else None, image.mask_sha256)
        file = str(image.file)
        below = f"/{image.name}"
        if file.endswith(below):
            self._folders.append((file.removesuffix(below), True))
        else:
            self._folders.append((file, False))
        self._spans.extend(image.span or (0, 0))
        self._names.append(image.name)
        self._sha256.append(image.sha256)
        self._widths.append(image.width)
        self._heights.append(image.height)
        self._common.append(
            (
                *(image.dataset, image.subset, image.has_alpha, image.part_of, image.convention),
                *(image.caption_encoding, image.captioned_by),
            )
        )
        self._captions.append(image.caption)
        self._caption_files.append(image.caption_file)

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, place: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, place: slice) -> list[ImageRecord]: ...
    def __getitem__(self, place: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(place)
        folder, has_name_below = self._folders[place]
        name = self._names[place] or ""
        dataset, subset, has_alpha, part_of, convention, encoding, captioned_by = self._common[place]
        begin, length = self._spans[2 * place : 2 * place + 2]
        mask_file, mask_sha256 = self._masks.get(place, (None, None))
        return ImageRecord(
            name=name,
            file=Path(f"{folder}/{name}" if has_name_below else folder),
            sha256=self._sha256[place],
            width=self._widths[place],
            height=self._heights[place],
            dataset=dataset,
            subset=subset,
            caption=self._captions[place],
            has_alpha=has_alpha,
            mask_file=Path(mask_file) if mask_file else None,
            mask_sha256=mask_sha256,
            part_of=part_of,
            convention=convention,
            caption_file=self._caption_files[place] or "",
            caption_encoding=encoding,
            captioned_by=captioned_by,
            span=(begin, length) if length else None,
        )

    def __iter__(self) -> Iterator[ImageRecord]:
        for place in range(len(self)):
            yield self[place]

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of equal images."""
        if not isinstance(other, Sequence) or len(other) != len(self):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Chosen(Sequence[ImageRecord]):
    """Some images of a sequence, by their places there."""

    def __init__(self, images: Sequence[ImageRecord], places: Sequence[int]) -> None:
        self._images = images
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, place: slice) -> Chosen: ...
    def __getitem__(self, place: int | slice) -> ImageRecord | Chosen:
        if isinstance(place, slice):
            return Chosen(self._images, self._places[place])
        return self._images[self._places[place]]

    def __iter__(self) -> Iterator[ImageRecord]:
        for place in self._places:
            yield self._images[place]
