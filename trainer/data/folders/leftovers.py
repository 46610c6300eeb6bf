"""Files and folders beside images that are no images to train on: those of systems and of other programs.

A name alone leaves out only what nobody trains on (`.git`, `Thumbs.db`). A name that might be an image's own (`x_mask`,
`samples/`) counts only where the image that it belongs to is there as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

SYSTEM_FOLDERS = {
    "__macosx": "the copies that macOS puts into archives",
    "@eadir": "the thumbnails of a Synology disk",
    "$recycle.bin": "Windows' recycle bin",
    "system volume information": "a system folder of Windows",
    "lost+found": "a system folder of the volume",
    "#recycle": "the recycle bin of a network disk",
    "#snapshot": "the snapshots of a network disk",
    "@recycle": "the recycle bin of a network disk",
    "@recently-snapshot": "the snapshots of a network disk",
    "__pycache__": "a cache of Python",
    "_latent_cache": "a cache of another trainer",
    "_t_e_cache": "a cache of another trainer",
    "_clip_vision_cache": "a cache of another trainer",
}
SYSTEM_FILES = {
    "thumbs.db": "the thumbnails of Windows",
    "ehthumbs.db": "the thumbnails of Windows",
    "desktop.ini": "a system file of Windows",
    "icon\r": "a system file of macOS",
}
SET_ASIDE = re.compile(r"\.set-aside(-\d+)?$")
HIDDEN = "hidden (its name begins with a dot)"
KEPT = "what Kiln has set aside"
OWN_MARKER = ".kiln-complete.json"  # in folders that Kiln has unpacked, and nothing that a user put there
# What another file of the same name is, if the part of its stem after the image's says so.
MASK_ENDING = re.compile(r"[-_. ](masklabel|masks?|matte)$", re.IGNORECASE)
MAP_ENDING = re.compile(r"[-_. ](condlabel|conditioning|control|canny|depth|openpose)$", re.IGNORECASE)
PREVIEW_ENDING = re.compile(r"\.(preview|thumb|thumbnail)$", re.IGNORECASE)
MASK_FOLDERS = ("mask", "masks", "masklabel", "masklabels", "matte", "mattes")
MAP_FOLDERS = ("conditioning", "conditioning_images", "control", "controls", "controlnet", "depth", "canny", "openpose")
SMALL_FOLDERS = ("thumbs", "thumb", "thumbnails", "thumbnail", "previews", "preview")
SAMPLE_FOLDERS = ("sample", "samples", "training_samples", "validation_images", "validation_samples")
DOUBTFUL_FOLDERS = frozenset((*MASK_FOLDERS, *MAP_FOLDERS, *SMALL_FOLDERS, *SAMPLE_FOLDERS))
# The names that trainers give to samples: sd-scripts, ai-toolkit, OneTrainer, SimpleTuner, Kiln.
SAMPLE_NAME = re.compile(
    r".*_(e\d{6}|\d{6})_\d{2}_\d{14}(_\d+)?|\d{9,}__\d{9}_\d+|.*-training-sample-.*|step_\d+_.*|step-\d{8}-\d{2,}(-at-[\d.]+)?"
    r"|contact-sheet"
)
KINDS = ("mask", "map", "preview", "sample")  # of a `Companion`
KEEP_IT = "If it is an image to train on, rename it."


@dataclass(frozen=True)
class Companion:
    """An image file that belongs to another image. `base`: that image's name without suffix; None for samples."""

    base: str | None
    kind: str  # one of KINDS
    reason: str


def folder_reason(name: str) -> str | None:
    """Why a folder of this name is never looked into; None: it is."""
    if name.startswith("."):
        return HIDDEN
    if SET_ASIDE.search(name):
        return KEPT
    return SYSTEM_FOLDERS.get(name.lower())


def file_reason(name: str) -> str | None:
    """Why a file of this name is never looked at; None: it is."""
    if name.startswith("._"):
        return "attributes that macOS keeps beside a file"
    if name.startswith("."):
        return HIDDEN
    if SET_ASIDE.search(name):
        return KEPT
    return SYSTEM_FILES.get(name.lower())


def companions(images: Sequence[str], others: Collection[str]) -> dict[str, Companion]:
    """The image files among `images` (relative, with /) that belong to another one, by name.

    `others`: the files beside them, since a preview may belong to a model.
    """
    stems = {stem(name) for name in images}
    model_stems = {stem(name) for name in others if name.lower().endswith((".safetensors", ".ckpt", ".pt"))}
    found: dict[str, Companion] = {}
    for name in images:
        companion = _by_ending(name, stems, model_stems) or _by_folder(name, stems)
        if companion is not None:
            found[name] = companion
    if any(not _in_samples(name) for name in images if name not in found):
        for name in images:
            if name not in found and _in_samples(name) and SAMPLE_NAME.fullmatch(PurePosixPath(name).stem):
                found[name] = Companion(None, "sample", "its name says that a trainer drew it as a sample")
    return found


def doubtful_folders(images: Sequence[str]) -> list[str]:
    """The folders of images that are trained on although the folders' names are those of masks, samples and the like.

    None where all images are in such folders.
    """
    found: dict[str, None] = {}
    outside = False
    for name in images:
        folders = name.split("/")[:-1]
        doubtful = [i for i, folder in enumerate(folders) if folder.lower() in DOUBTFUL_FOLDERS]
        if doubtful:
            found["/".join(folders[: doubtful[0] + 1])] = None
        else:
            outside = True
    return sorted(found) if outside else []


def mask_stems(name: str) -> list[str]:
    """The stems of the images that a mask `name` may belong to, the likeliest first."""
    own = stem(name)
    shorter = MASK_ENDING.sub("", own)
    return [own] if shorter == own else [own, shorter]


def stem(name: str) -> str:
    """`a/b.jpg` → `a/b`."""
    return str(PurePosixPath(name).with_suffix(""))


def _by_ending(name: str, stems: Collection[str], model_stems: Collection[str]) -> Companion | None:
    """`x-masklabel.png` belongs to `x.jpg`, if that is there."""
    own = stem(name)
    for kind, ending in (("mask", MASK_ENDING), ("map", MAP_ENDING), ("preview", PREVIEW_ENDING)):
        base = ending.sub("", own)
        if base == own or not PurePosixPath(base).name:
            continue
        if base in stems:
            return _companion(base, kind)
        if kind == "preview" and base in model_stems:
            return _companion(base, kind)
    return None


def _by_folder(name: str, stems: Collection[str]) -> Companion | None:
    """`a/masks/b/x.png` belongs to `a/b/x.jpg`, if that is there; so does `a/masks/b/x_mask.png`."""
    parts = PurePosixPath(stem(name)).parts
    for position, folder in enumerate(parts[:-1]):
        for kind, folders in (("mask", MASK_FOLDERS), ("map", MAP_FOLDERS), ("preview", SMALL_FOLDERS)):
            if folder.lower() not in folders:
                continue
            base = str(PurePosixPath(*parts[:position], *parts[position + 1 :]))
            for candidate in (base, MASK_ENDING.sub("", base), MAP_ENDING.sub("", base)):
                if candidate in stems:
                    return _companion(candidate, kind)
    return None


def _companion(base: str, kind: str) -> Companion:
    words = {"mask": "the mask", "map": "a conditioning image", "preview": "a small preview"}
    return Companion(base, kind, f"its name says that it is {words[kind]} of {base}")


def _in_samples(name: str) -> bool:
    return any(part.lower() in SAMPLE_FOLDERS for part in PurePosixPath(name).parts[:-1])
