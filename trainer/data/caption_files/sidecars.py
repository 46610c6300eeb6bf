"""The text file beside an image that holds its caption: which names it may have."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

USUAL_EXTENSIONS = (".txt", ".caption")  # tried after the subset's caption_extension
# Captions of other tools, which are read where caption_extension asks for them; else they are named.
OTHER_EXTENSIONS = (".tags", ".tag", ".cap", ".prompt", ".description", ".desc", ".captions", ".json", ".yaml", ".xml")
# Text files that lie in many folders and are no captions.
NO_CAPTIONS = ("readme", "license", "licence", "notes", "changelog", "classes", "prompts", "sample_prompts", "urls")


def folded(name: str) -> str:
    """A name for comparison: macOS writes accents as characters of their own, and Windows ignores case."""
    return unicodedata.normalize("NFC", name).casefold()


def extensions(first: str) -> tuple[str, ...]:
    """The extensions of captions in lower case, in the order in which they are tried."""
    if not first.startswith("."):
        first = f".{first}"
    return tuple(dict.fromkeys([first.lower(), *USUAL_EXTENSIONS]))


@dataclass
class Sidecars:
    """The text files of a folder, and the images that they belong to."""

    of_image: dict[str, str] = field(default_factory=dict)  # image → the file that is read
    passed_over: dict[str, str] = field(default_factory=dict)  # file → the one that is read instead
    other_tools: dict[str, str] = field(default_factory=dict)  # file → its image
    orphans: list[str] = field(default_factory=list)  # files with the extension of a caption, without an image
    of_skipped: dict[str, str] = field(default_factory=dict)  # file → its image, which is not used


def find_sidecars(images: Sequence[str], skipped: Iterable[str], others: Sequence[str], *, extension: str) -> Sidecars:
    """Match the files `others` to `images`, and to `skipped` ones. All names are relative to one folder.

    The caption of `a.png` is `a.txt` or else `a.png.txt`, with the first extension that exists. Where `a.jpg` is there
    too, `a.txt` may be that of either, so `a.png.txt` comes first.
    """
    tried = extensions(extension)
    by_base: dict[str, list[str]] = {}  # folded name without extension → files with the extension of a caption
    for other in others:
        base, ending = _split(other, tried)
        if ending in tried or ending in OTHER_EXTENSIONS:
            by_base.setdefault(folded(base), []).append(other)
    stems = Counter(folded(_split(image, (image,))[0]) for image in images)
    found = Sidecars()
    known: set[str] = set()
    for image in images:
        is_shared = stems[folded(_split(image, (image,))[0])] > 1
        files = _files_of(image, by_base, tried, is_shared=is_shared)
        known.update(files)
        read = [file for file in files if _split(file, tried)[1] in tried]
        if read:
            found.of_image[image] = read[0]
        for file in read[1:]:
            found.passed_over.setdefault(file, read[0])
        for file in files:
            if file not in read:
                found.other_tools[file] = image
    for file in found.of_image.values():
        found.passed_over.pop(file, None)
    for image in skipped:
        for file in _files_of(image, by_base, tried):
            if file not in known:
                found.of_skipped[file] = image
    for other in others:
        base, ending = _split(other, tried)
        is_caption = ending in tried and base.rpartition("/")[2].casefold() not in NO_CAPTIONS
        if is_caption and other not in known and other not in found.of_skipped:
            found.orphans.append(other)
    return found


def _split(name: str, tried: Sequence[str]) -> tuple[str, str]:
    """`a/b.TXT` → `a/b`, `.txt`. The extension that is tried first may have several dots."""
    base = name[: -len(tried[0])]
    if name.lower().endswith(tried[0]) and base and not base.endswith("/"):
        return base, tried[0]
    # Not PurePosixPath, which takes seconds for a hundred thousand names.
    base, dot, ending = name.rpartition(".")
    if not dot or not base or base.endswith("/") or "/" in ending:
        return name, ""
    return base, f".{ending.lower()}"


def _files_of(image: str, by_base: dict[str, list[str]], tried: Sequence[str], *, is_shared: bool = False) -> list[str]:
    """The text files of an image, best first: by extension, then `a.txt` before `a.png.txt`, then by spelling.

    `is_shared`: another image has the same name but for its suffix; then `a.png.txt` comes before `a.txt`.
    """
    stem = _split(image, (image,))[0]
    files = [*by_base.get(folded(stem), ()), *by_base.get(folded(image), ())]
    # Where names differ in case alone, each image has its own file.
    exact = [file for file in files if _split(file, tried)[0] in (stem, image)]
    files = exact or files
    if len(files) < 2:
        return files
    order = (*tried, *OTHER_EXTENSIONS)
    first = stem
    if is_shared:
        first = image
    return sorted(files, key=lambda file: (order.index(_split(file, tried)[1]), _split(file, tried)[0] != first, file))
