"""What one shard gives: its images, each with its caption, its place in the shard, and what was found when it was read.

A caption is the text file of the same name (`7.txt` of `7.jpg`, as beside an image in a folder), or the caption in
`7.json`. The shard is read from its beginning to its end once, and nothing of it is kept but the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trainer.data import decode
from trainer.data.caption_files.find import MAX_SIDECAR_BYTES
from trainer.data.caption_files.formats import CAPTION_NAMES, MORE_CAPTION_NAMES, TAGS, normal, parse_json
from trainer.data.caption_files.sidecars import find_sidecars
from trainer.data.caption_files.text_encoding import decode_all
from trainer.data.captions import clean
from trainer.data.compact.examined import FileInfo
from trainer.data.decode import UnusableImageError
from trainer.data.folders import formats, leftovers
from trainer.data.shards.members import Member, read_members
from trainer.storage.read import read_span

JSON = ".json"
JSON_COLUMN = "json."  # before a key of these files, as the Hub names such a column


@dataclass(frozen=True, slots=True)
class AskedCaptions:
    """What the settings of a subset say of captions: the first extension that is tried, and CAPTION_COLUMN."""

    extension: str
    column: str | None = None


@dataclass(frozen=True, slots=True)
class ShardSample:
    """An image in a shard. `found`: what is in it, or the reason why it is unusable."""

    member: Member
    found: FileInfo | str
    caption: str | None = None
    caption_file: str = ""
    caption_encoding: str = ""


@dataclass
class ShardTable:
    """The samples of a shard in their order; files that are not used, with the reason; damage, if there is any."""

    samples: list[ShardSample] = field(default_factory=list)
    unused: list[tuple[str, str]] = field(default_factory=list)
    damage: str = ""


def read_table(shard: Path, asked: AskedCaptions) -> ShardTable:
    """Read a shard. A shard that cannot be read at all is one without samples, whose `damage` says why."""
    try:
        members = read_members(shard)
    except OSError as problem:
        return ShardTable(damage=f"it cannot be read: {problem.strerror}")
    table = ShardTable(unused=members.left_out, damage=members.damage)
    images: dict[str, Member] = {}
    others: dict[str, Member] = {}
    for member in members.files:
        suffix = PurePosixPath(member.name).suffix
        reason = leftovers.file_reason(PurePosixPath(member.name).name)
        if reason is not None:
            table.unused.append((member.name, reason))
        elif formats.READABLE.fullmatch(suffix) or formats.UNREADABLE.fullmatch(suffix):
            images[member.name] = member
        else:
            others[member.name] = member
    companions = leftovers.companions(list(images), list(others))
    for name, companion in companions.items():
        table.unused.append((name, companion.reason))
        del images[name]
    captions = _Captions(shard, images, others, asked)
    for member in images.values():
        text, file, encoding = captions.of(member.name)
        table.samples.append(ShardSample(member, _examine(shard, member), text, file, encoding))
    table.unused += captions.unused()
    return table


def _examine(shard: Path, member: Member) -> FileInfo | str:
    """As the scan examines a file."""
    suffix = PurePosixPath(member.name).suffix
    if not formats.READABLE.fullmatch(suffix):
        return formats.why_unreadable(suffix)
    if member.length > decode.MAX_FILE_BYTES:
        return "larger than 1 GiB"
    try:
        data = read_span(shard, member.offset, member.length)
        found = decode.inspect(data)
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    except UnusableImageError as problem:
        return str(problem)
    return FileInfo(hashlib.sha256(data).hexdigest(), found.width, found.height, found.has_alpha, found.looks)


class _Captions:
    """The captions in a shard, by the name of the image."""

    def __init__(self, shard: Path, images: dict[str, Member], others: dict[str, Member], asked: AskedCaptions) -> None:
        self._others = others
        self._problems: list[tuple[str, str]] = []
        self._read: set[str] = set()
        sidecars = find_sidecars(list(images), (), list(others), extension=asked.extension)
        key = (asked.column or "").removeprefix(JSON_COLUMN) or None
        # CAPTION_COLUMN may be the ending of text files, as in the Hub's view of a webdataset, or a key of the .json.
        self._of_image = {} if key and not _is_ending(asked.column, others) else dict(sidecars.of_image)
        self._keys = (key,) if key and not self._of_image else (*CAPTION_NAMES, *MORE_CAPTION_NAMES, TAGS)
        if asked.column and self._of_image:
            self._of_image = find_sidecars(list(images), (), list(others), extension=asked.column).of_image
        self._json = {}
        for name in images:
            beside = str(PurePosixPath(name).with_suffix(JSON))
            if name not in self._of_image and beside in others:
                self._json[name] = beside
        wanted = {*self._of_image.values(), *self._json.values()}
        self._texts = decode_all(self._contents(shard, wanted))

    def _contents(self, shard: Path, names: set[str]) -> dict[str, bytes]:
        contents = {}
        for name in sorted(names, key=lambda name: self._others[name].offset):
            member = self._others[name]
            if member.length > MAX_SIDECAR_BYTES:
                self._problems.append((name, "larger than 1 MiB: no caption"))
                continue
            try:
                contents[name] = read_span(shard, member.offset, member.length)
            except OSError as problem:
                self._problems.append((name, f"cannot be read: {problem.strerror}"))
        return contents

    def of(self, image: str) -> tuple[str | None, str, str]:
        """The caption of an image, the file that it is from, and that file's encoding."""
        file = self._of_image.get(image) or self._json.get(image)
        decoded = self._texts.get(file or "")
        if file is None or decoded is None:
            return None, "", ""
        text: str | None = decoded.text
        if not decoded.encoding:
            self._problems.append((file, "its text is in no encoding that is known"))
            return None, "", ""
        if image in self._json:
            text = self._from_json(file, decoded.text)
        self._read.add(file)
        if text is None:
            return None, "", ""
        return clean(text), file, decoded.encoding

    def _from_json(self, name: str, text: str) -> str | None:
        try:
            row = parse_json(text, where=name)
        except ValueError as problem:
            self._problems.append((name, str(problem)))
            return None
        if not isinstance(row, dict):
            return None
        by_normal = {normal(key): value for key, value in row.items()}
        for key in self._keys:
            value = by_normal.get(normal(key))
            if isinstance(value, list) and all(isinstance(line, str) for line in value):
                value = (", " if key == TAGS else "\n").join(value)
            if isinstance(value, str) and value.strip():
                return value
        return None

    def unused(self) -> list[tuple[str, str]]:
        """The other files that nothing is taken from; those with a problem have it as the reason."""
        found = list(self._problems)
        known = {name for name, _ in found} | self._read
        found += [(name, "it is not read") for name in self._others if name not in known]
        return found


def _is_ending(column: str | None, others: dict[str, Member]) -> bool:
    """Whether CAPTION_COLUMN is the ending of files in the shard."""
    ending = f".{(column or '').lower().removeprefix('.')}"
    return ending != JSON and any(name.lower().endswith(ending) for name in others)


# ---- as lines of text: the table of a shard that is not kept


def to_lines(table: ShardTable) -> list[str]:
    """One line for the shard and one for each sample."""
    lines = [json.dumps({"unused": table.unused, "damage": table.damage})]
    for sample in table.samples:
        member, found = sample.member, sample.found
        row: list[object] = [member.name, member.offset, member.length]
        row += [sample.caption, sample.caption_file, sample.caption_encoding]
        row.append(found if isinstance(found, str) else found.to_row())
        lines.append(json.dumps(row))
    return lines


def from_lines(lines: Sequence[str]) -> ShardTable:
    """Raises ValueError, TypeError, LookupError for anything that `to_lines` has not made."""
    head = json.loads(lines[0])
    table = ShardTable(unused=[(name, reason) for name, reason in head["unused"]], damage=str(head["damage"]))
    for line in lines[1:]:
        name, offset, length, caption, file, encoding, found = json.loads(line)
        info = found if isinstance(found, str) else FileInfo.from_row(found)
        table.samples.append(ShardSample(Member(name, int(offset), int(length)), info, caption, file, encoding))
    return table
