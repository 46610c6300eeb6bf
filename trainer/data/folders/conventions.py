"""Kohya's folders: `img/10_ohwx woman` says 10 repeats and a caption, `reg/1_woman` has regularisation images.

sd-scripts reads `10_ohwx woman` directly below its train_data_dir: each image counts 10 times in an epoch, and `ohwx
woman` is the caption of an image that has none. The folders below its reg_data_dir likewise. Here both are found at any
depth, so that `kohya/`, `kohya/img` and `kohya/img/10_ohwx woman` mean the same, whether on a disk or in an archive.

A number need not mean repeats: `1920_wallpapers`, `2023_holiday`, `01_front`. Such a folder is a plain one, and a
warning names it. Nothing of this is guessed in silence: each folder that is understood has its line in the log.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from trainer.data.folder_listing import Folder
from trainer.data.folders import leftovers
from trainer.data.records import WARNING
from trainer.spec.plan import Subset
from trainer.spec.values import printable, some

NUMBERED = re.compile(r"\s*(\d+)(_(.*))?", re.ASCII | re.DOTALL)
ALMOST_NUMBERED = re.compile(r"\s*\d+([\s.-]+|x[\s_-])[^\W\d].*", re.DOTALL)
# More repeats than this are rather a year, a size or a count. In a folder that is kohya's beyond doubt, more are meant.
MOST_REPEATS = 200
MOST_REPEATS_IN_IMG = 1000
SIZES = (256, 384, 512, 640, 720, 768)  # pixels, as in `512_cats`; larger ones are above the limits
SHORTEST_ENUMERATION = 3  # 1_front, 2_side, 3_back
IMG_FOLDERS = ("img", "train_data", "train_data_dir", "instance_images", "instance_data")
REGULAR_FOLDERS = re.compile(
    r"regs?|regulari[sz]ations?|(reg|regulari[sz]ation|class)_?(imgs?|images?|pictures|photos|data|data_dir)"
)
BESIDE_IMG = ("log", "logs", "model", "models", "sample", "samples")  # what kohya's GUI makes beside img
ONLY_A_NUMBER = "it has a number without a name after it"
AS_DATASET_JSON = 'if repeats are meant, give it "image_dir" and "num_repeats" in dataset.json'


@dataclass(frozen=True)
class Part:
    """A folder of a subset that its name makes a subset of its own."""

    folder: str  # relative to the subset's folder; "": that folder itself
    repeats: int
    words: str | None  # the caption of an image that has none
    is_reg: bool


@dataclass
class Reading:
    """What the names of the folders in a subset mean. `notes`: one line each, for the log."""

    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def part_of(self, name: str) -> int | None:
        """The number of the part that the image `name` belongs to; None if it belongs to none."""
        best = None
        for number, part in enumerate(self.parts):
            belongs = not part.folder or name.startswith(f"{part.folder}/")
            if belongs and (best is None or len(part.folder) > len(self.parts[best].folder)):
                best = number
        return best


def read_folders(folder: Folder, location: str) -> Reading:
    """What the folders of `folder`, which the user named `location`, mean; takes out of `folder` what is not trained.

    Of the folder's own name only the part after `location`'s last / counts.
    """
    reading = Reading()
    _leave_out_beside_img(folder)
    tree = _tree(folder.images)
    regular = _regular_folders(folder.images, tree)
    plain: dict[str, str] = {}  # folders with a number that is not read → why not
    for parent in sorted(tree, key=lambda path: (path.count("/"), path)):
        if reading.part_of(f"{parent}/") is None:
            names = _Siblings(parent, tree, regular, location)
            names.read(folder, reading, plain)
    for place in regular:
        if not any(part.folder.startswith(f"{place}/") for part in reading.parts):
            reading.notes.append(
                f"{WARNING}folder {printable(place)}: its name says that it has regularisation images, which show the "
                "class and not the subject. If they are to be learnt, rename it."
            )
        if any(reading.part_of(name) is None for name in folder.images if name.startswith(f"{place}/")):
            reading.parts.append(Part(place, 1, None, is_reg=True))
    if not reading.parts and not plain:
        _read_own_name(location, reading, plain)
    reading.parts.sort(key=lambda part: part.folder)
    _note(folder, reading, plain, location)
    return reading


def derived_subset(subset: Subset, part: Part, number: int) -> tuple[Subset, list[str]]:
    """The subset that `part` makes of `subset`, which is the `number`-th of its dataset; and notes.

    The user's own num_repeats and class_tokens win over the folder's name.
    """
    notes = []
    name = printable(part.folder or PurePosixPath(subset.source.location).name)
    repeats = part.repeats
    if subset.repeats_chosen or subset.num_repeats != 1:
        repeats = subset.num_repeats
        if repeats != part.repeats:
            notes.append(f"{WARNING}{name}: num_repeats {repeats} is set, and wins over {part.repeats} in its name.")
    words = part.words
    if subset.class_tokens is not None:
        words = subset.class_tokens
        if part.words not in (None, words):
            notes.append(f"{WARNING}{name}: class_tokens {words!r} is set, and wins over {part.words!r} in its name.")
    derived = replace(
        subset,
        num_repeats=repeats,
        class_tokens=words,
        is_reg=subset.is_reg or part.is_reg,
        part_of=number,
        folder=part.folder,
    )
    return derived, notes


# ---- reading names


def _tree(images: Sequence[str]) -> dict[str, list[str]]:
    """Each folder that has images somewhere below it → its subfolders that have."""
    children: dict[str, dict[str, None]] = defaultdict(dict)
    seen: set[str] = set()
    for name in images:
        folder = name.rpartition("/")[0]
        while folder and folder not in seen:
            seen.add(folder)
            parent = folder.rpartition("/")[0]
            children[parent][folder] = None
            folder = parent
    return {parent: sorted(names) for parent, names in children.items()}


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _simple(name: str) -> str:
    """`Reg-Images` → `reg_images`."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _is_inside(path: str, folders: Collection[str]) -> bool:
    return any(path.startswith(f"{folder}/") for folder in folders)


def _regular_folders(images: Sequence[str], tree: dict[str, list[str]]) -> list[str]:
    """The folders of regularisation images: by their names, and only where other images are outside of them."""
    found: list[str] = []
    for parent in sorted(tree, key=lambda path: path.count("/")):
        for child in tree[parent]:
            is_named = REGULAR_FOLDERS.fullmatch(_simple(_last(child)))
            is_inside_part = any(NUMBERED.fullmatch(part) for part in child.split("/")[:-1])
            if is_named and not is_inside_part and not _is_inside(child, found):
                found.append(child)
    return found if any(not _is_inside(name, found) for name in images) else []


@dataclass(frozen=True)
class _Siblings:
    """The folders directly in `parent`."""

    parent: str
    tree: dict[str, list[str]]
    regular: Sequence[str]
    location: str  # of the subset's folder

    @property
    def are_kohyas(self) -> bool:
        """Whether numbers are repeats beyond doubt: in `img`, and where regularisation images are beside."""
        name = _simple(_last(self.parent) or PurePosixPath(self.location).name)
        beside = list(self.tree[self.parent])
        if self.parent:
            beside += [self.parent, *self.tree[self.parent.rpartition("/")[0]]]
        return name in IMG_FOLDERS or any(folder in self.regular for folder in beside)

    def read(self, folder: Folder, reading: Reading, plain: dict[str, str]) -> None:
        """Add the numbered folders to the parts of `reading` or to `plain`."""
        certain = self.are_kohyas
        numbered: dict[str, tuple[str, str | None]] = {}
        for child in self.tree[self.parent]:
            match = NUMBERED.fullmatch(_last(child))
            if match:
                numbered[child] = (match[1], match[3])
            elif ALMOST_NUMBERED.fullmatch(_last(child)):
                plain[child] = "a number of repeats has an underscore behind it, as in 10_name"
        in_order = not certain and _are_enumerated([number for number, _ in numbered.values()])
        for child, (number, words) in numbered.items():
            reason = _why_plain(number, words, certain=certain)
            if reason is None and in_order:
                reason = "the folders seem to be numbered in sequence"
            if reason is not None:
                plain[child] = reason
            elif int(number) == 0:
                folder.leave_out(child, "0 repeats in its name", kind="zero")
            else:
                is_reg = _is_inside(child, self.regular)
                reading.parts.append(Part(child, int(number), (words or "").strip() or None, is_reg))


def _are_enumerated(numbers: Sequence[str]) -> bool:
    """Whether folders are called 1_front, 2_side, 3_back."""
    counts = sorted(int(number[:9]) for number in numbers)
    return (
        len(counts) >= SHORTEST_ENUMERATION and counts[0] <= 1 and counts == [counts[0] + i for i in range(len(counts))]
    )


def _why_plain(number: str, words: str | None, *, certain: bool) -> str | None:
    """Why `number` in a folder's name is not read as repeats; None: it is."""
    count = int(number) if len(number) <= 9 else 10**9
    if certain and count <= MOST_REPEATS_IN_IMG and count not in SIZES:
        return None
    if words is None:
        return ONLY_A_NUMBER
    if number.startswith("0") and number != "0":
        return f"{number} seems to be a position in a sequence"
    if count in SIZES or count > (MOST_REPEATS_IN_IMG if certain else MOST_REPEATS):
        return f"{number} may be a year, a size or a count"
    return None


def _read_own_name(location: str, reading: Reading, plain: dict[str, str]) -> None:
    """The name of the subset's folder itself, where it has no numbered folders."""
    path = PurePosixPath(location)
    match = NUMBERED.fullmatch(path.name)
    if not match or match[3] is None or int(match[1][:9]) == 0:
        return
    reason = _why_plain(match[1], match[3], certain=_simple(path.parent.name) in IMG_FOLDERS)
    if reason is None:
        reading.parts.append(Part("", int(match[1]), match[3].strip() or None, is_reg=False))
    else:
        plain[""] = reason


def _leave_out_beside_img(folder: Folder) -> None:
    """Leave out `log` and `model`, which kohya's GUI makes beside `img`: a model's folder has samples in it."""
    tree = _tree(folder.images)
    for children in tree.values():
        names = {_simple(_last(child)): child for child in children}
        if "img" not in names or not any(NUMBERED.fullmatch(_last(child)) for child in tree.get(names["img"], ())):
            continue
        for name in BESIDE_IMG:
            if name in names:
                folder.leave_out(names[name], "beside img: what kohya's trainer wrote", kind="kohya")


# ---- what is said


def _note(folder: Folder, reading: Reading, plain: dict[str, str], location: str) -> None:
    """A line for each folder whose name means something, and warnings of what may be meant otherwise."""
    by_part: dict[int | None, list[str]] = defaultdict(list)
    for name in folder.images:
        by_part[reading.part_of(name)].append(name)
    for number, part in enumerate(reading.parts):
        reading.notes.append(_meaning(part, len(by_part[number]), location))
        unread = _numbered_below(by_part[number], part)
        if unread:
            reading.notes.append(f"{WARNING}folder {some(unread)}: the number is not read inside of {part.folder}.")
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in plain.items():
        if not name or any(image.startswith(f"{name}/") for image in by_part[None]):
            reasons[reason].append(name or PurePosixPath(location).name)
    for reason, names in reasons.items():
        level = "" if reason == ONLY_A_NUMBER else WARNING
        reading.notes.append(f"{level}folder {some(names)}: a plain folder, 1 repeat ({reason}); {AS_DATASET_JSON}.")
    beside = [name for name in by_part[None] if not _is_inside(name, plain)]
    if beside and not all(part.is_reg for part in reading.parts):
        reading.notes.append(
            f"{WARNING}{len(beside)} images are not in a folder with repeats in its name ({some(beside)}): they are "
            "trained too, with 1 repeat. Move them away if they are not meant; sd-scripts ignores them."
        )
    doubtful = leftovers.doubtful_folders(folder.images)
    if doubtful:
        reading.notes.append(
            f"{WARNING}folder {some(doubtful)}: its images are trained on. If they are masks, samples or previews of "
            "other images, move them away."
        )


def _meaning(part: Part, count: int, location: str) -> str:
    """What the name of a folder says, in words."""
    said = [f"{part.repeats} repeats" if part.repeats != 1 else "1 repeat"]
    if part.words:
        said.append(f"caption {part.words!r} where an image has none")
    if part.is_reg:
        said.append("regularisation images (is_reg), which the trigger word stays away from")
    name = printable(part.folder or PurePosixPath(location).name)
    return f"folder {name}: {', '.join(said)}; {count} images"


def _numbered_below(images: Sequence[str], part: Part) -> list[str]:
    """The folders inside of a part that have repeats in their names too."""
    found: dict[str, None] = {}
    start = f"{part.folder}/" if part.folder else ""
    for name in images:
        folders = name[len(start) :].split("/")[:-1]
        for depth, folder in enumerate(folders):
            match = NUMBERED.fullmatch(folder)
            if match and match[3]:
                found[start + "/".join(folders[: depth + 1])] = None
    return list(found)
