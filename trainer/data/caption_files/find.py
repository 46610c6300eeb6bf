"""The captions of a subset: which file has the caption of which image, and what the user must hear about it."""

from __future__ import annotations

import errno
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trainer.data.caption_files.findings import Findings
from trainer.data.caption_files.formats import METADATA, SUFFIXES
from trainer.data.caption_files.matching import ImageNames
from trainer.data.caption_files.sidecars import Sidecars, find_sidecars
from trainer.data.caption_files.tables import Row, read_table
from trainer.data.caption_files.text_encoding import Decoded, decode_all
from trainer.data.captions import CONTROLS, Caption, clean, removed_characters
from trainer.data.folder_listing import LINK_OUT, Folder, leads_out, resolve
from trainer.spec.plan import Subset
from trainer.spec.values import many, printable, some
from trainer.storage.read import read_regular

TABLES = (*SUFFIXES, ".parquet", ".xls", ".xlsx", ".ods")  # of captions, perhaps
MAX_METADATA_BYTES = 1 << 30  # some millions of captions
MAX_SIDECAR_BYTES = 1 << 20  # 1 MiB is some 200,000 words: no caption
MOST_REMOVED_SHARE = 0.1  # of a text's characters: with more that no caption has, it is no text
# How a file begins that has the name of a caption and is something else.
NO_CAPTION = {
    "{\\rtf": "it is RTF: save it as plain text",
    "<!doctype html": "it is a web page",
    "<html": "it is a web page",
    "version https://git-lfs.": "it is a pointer of Git LFS: run git lfs pull",
}


@dataclass
class FoundCaptions:
    """The captions by the image's name, and what to say. `read`: the files that captions came from."""

    captions: dict[str, Caption] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    read: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Metadata:
    """A metadata file. `prefix`: the folder, relative to the subset's, that its names are relative to."""

    title: str  # for messages
    file: Path
    prefix: str


def find_captions(folder: Folder, subset: Subset) -> FoundCaptions:
    """Metadata files win over sidecar files, these over class_tokens. What is wrong goes to `Findings.problems`."""
    found = FoundCaptions()
    skipped = [name for name, _ in folder.skipped]
    metadata = _metadata_files(folder, subset)
    read_as_metadata = {_relative(table.file, folder.root) for table in metadata}
    others = [name for name in folder.others if name not in read_as_metadata]
    sidecars = find_sidecars(folder.images, skipped, others, extension=subset.caption_extension)
    texts = _read_files(folder, sidecars, metadata, found.findings)
    if subset.class_tokens:
        found.captions = dict.fromkeys(folder.images, Caption(subset.class_tokens, "class_tokens", "class_tokens"))
    for image, file in sidecars.of_image.items():
        if file in texts:
            text = texts[file]
            found.captions[image] = Caption(clean(text.text), "sidecar", file, text.encoding)
            found.read.add(file)
    for table in metadata:
        if table.title in texts:
            found.read.add(_relative(table.file, folder.root))
            _add_metadata(table, texts[table.title], folder, subset, found)
    _note_sidecars(sidecars, found, folder.images)
    _note_other_files(others, sidecars, found, subset, images=folder.images)
    if not metadata and subset.source.kind != "hub":
        asked = {"IMAGE_COLUMN": subset.source.image_column, "CAPTION_COLUMN": subset.source.caption_column}
        for variable, column in asked.items():
            if column:
                found.findings.warn(f"{variable}={column} chooses nothing: there is no metadata file (metadata.csv).")
    return found


# ---- files


def _metadata_files(folder: Folder, subset: Subset) -> list[_Metadata]:
    """The file that the subset names; without one, every file with a usual name, in any folder."""
    if subset.metadata_file is not None:
        return [_Metadata(subset.metadata_file, resolve(folder.root, subset.metadata_file), "")]
    files = []
    for other in folder.others:
        name = PurePosixPath(other)
        if METADATA.fullmatch(name.name):
            prefix = "" if str(name.parent) == "." else f"{name.parent}/"
            files.append(_Metadata(other, folder.root / name, prefix))
    return files


def _relative(file: Path, root: Path) -> str:
    """The name in the subset's folder, or the whole path."""
    if file.is_relative_to(root):
        return file.relative_to(root).as_posix()
    return str(file)


def _read_files(
    folder: Folder, sidecars: Sidecars, metadata: Sequence[_Metadata], findings: Findings
) -> dict[str, Decoded]:
    """The text of each sidecar and metadata file, by its name or title; without those that cannot be used."""
    data: dict[str, bytes] = {}
    for name in dict.fromkeys(sidecars.of_image.values()):
        content = _read_sidecar(folder.root / name, findings)
        if content is not None:
            data[name] = content
    for table in metadata:
        if leads_out(folder.root, table.title):
            findings.problems.append(f"metadata_file {printable(table.title)} cannot be read: {LINK_OUT}.")
            continue
        try:
            data[table.title] = read_regular(table.file, limit=MAX_METADATA_BYTES)
        except OSError as problem:
            findings.problems.append(f"metadata_file {printable(str(table.file))} cannot be read: {problem.strerror}.")
    decoded = decode_all(data)
    _note_encodings(decoded, findings)
    titles = {table.title for table in metadata}
    removed: list[str] = []
    usable = {}
    for name, text in decoded.items():
        if not text.encoding:
            continue  # is a problem already
        reason = None
        if name not in titles:
            reason = _why_no_caption(text.text)
            if reason is None and (characters := removed_characters(text.text)):
                removed.append(f"{name} ({', '.join(characters)})")
        if reason is None:
            usable[name] = text
        else:
            findings.problems.append(f"{name} is not a caption: {reason}.")
    if removed:
        findings.warn(
            f"control or invisible characters are taken out of {many(len(removed), 'caption')}: {some(removed)}. "
            "U+FFFD stands for a letter that was lost before."
        )
        findings.unused += [f"{name}: taken out of the caption" for name in removed]
    return usable


def _read_sidecar(path: Path, findings: Findings) -> bytes | None:
    try:
        return read_regular(path, limit=MAX_SIDECAR_BYTES)
    except OSError as problem:
        if problem.errno == errno.EFBIG:
            findings.problems.append(f"{path} is more than 1 MiB: not a caption. Remove it, or set caption_extension.")
        else:
            findings.problems.append(f"The caption {path} cannot be read: {problem.strerror}.")
        return None


def _why_no_caption(text: str) -> str | None:
    """Why this text of a file is none that describes an image."""
    start = text[:100].lstrip("\ufeff \t\r\n").lower()
    for beginning, reason in NO_CAPTION.items():
        if start.startswith(beginning):
            return reason
    visible = len(re.sub(r"\s", "", text))
    lost = len(CONTROLS.findall(text))
    if lost > MOST_REMOVED_SHARE * visible and lost > 3:
        return "its characters are not those of text"
    return None


def _note_encodings(decoded: Mapping[str, Decoded], findings: Findings) -> None:
    by_encoding = defaultdict(list)
    unreadable = []
    mojibake = []
    for name, text in decoded.items():
        if not text.encoding:
            unreadable.append(name)
        elif not text.is_unicode:
            by_encoding[text.encoding].append(name)
        elif _was_read_wrongly(text.text):
            mojibake.append(name)
    for encoding, names in by_encoding.items():
        examples = []
        for name in names:
            lines = clean(decoded[name].text).split("\n")
            foreign = next((line for line in lines if not line.isascii()), "")
            examples.append(f"{name} ({foreign[:60]})")
        findings.warn(
            f"not UTF-8, so read as {encoding}: {many(len(names), 'file')}: {some(examples)}. If these are the wrong "
            "characters, save the files as UTF-8."
        )
    if unreadable:
        findings.problems.append(
            f"neither Unicode nor another known encoding: {many(len(unreadable), 'file')}: {some(unreadable)}. Save as "
            "UTF-8."
        )
    if mojibake:
        findings.warn(
            f"UTF-8 that was once read as Windows-1252 and saved so: {many(len(mojibake), 'file')}: {some(mojibake)}."
        )


def _was_read_wrongly(text: str) -> bool:
    """Whether the text is UTF-8 that was once decoded as Windows-1252, such as "cafÃ©"."""
    if text.isascii():
        return False
    try:
        return text.encode("cp1252").decode("utf-8") != text
    except UnicodeError:
        return False


# ---- metadata


def _add_metadata(table: _Metadata, text: Decoded, folder: Folder, subset: Subset, found: FoundCaptions) -> None:
    """The captions of a metadata file in the place of those that are known already."""
    findings = found.findings
    rows = read_table(table.title, text.text, subset, findings)
    names = [name.removeprefix(table.prefix) for name in folder.images if name.startswith(table.prefix)]
    skipped = [name.removeprefix(table.prefix) for name, _ in folder.skipped if name.startswith(table.prefix)]
    by_image = _match(table.title, rows, names, skipped, folder.root / table.prefix, findings)
    several = []
    replaced = []
    for name, of_image in by_image.items():
        image = table.prefix + name
        captions = [row for row in of_image if row.caption is not None]
        if not captions:
            continue
        if len(captions) > 1:
            several.append(f"{name} ({', '.join(row.where for row in captions)})")
        where = f"{table.title}, {captions[0].where}"
        caption = "\n".join(row.caption or "" for row in captions)
        before = found.captions.get(image)
        if before is not None and before.origin != "class_tokens":
            findings.unused.append(f"{before.file}: {where} has the caption of {image}")
            if before.text != caption:
                replaced.append(f"{image} (not {before.file})")
        found.captions[image] = Caption(caption, "metadata", where, text.encoding)
    if several and not subset.enable_wildcard:
        findings.warn(
            f"{table.title}: several rows for {many(len(several), 'image')}: the first is used (enable_wildcard draws "
            f"one): {some(several)}."
        )
    if replaced:
        findings.warn(
            f"{table.title}: another caption elsewhere for {many(len(replaced), 'image')}; the row is used: "
            f"{some(replaced)}."
        )


def _match(
    title: str, rows: Sequence[Row], names: Sequence[str], skipped: Sequence[str], folder: Path, findings: Findings
) -> dict[str, list[Row]]:
    """The rows of each image. Rows without an image, and a guess that was needed, are named."""
    images = ImageNames(names, folder=folder)
    by_image: dict[str, list[Row]] = {}
    unknown = []
    for row in rows:
        matched = images.find(row.name)
        for name in matched:
            by_image.setdefault(name, []).append(row)
        if not matched:
            unknown.append(row)
    if unknown and not by_image:
        for row in unknown:
            for name in images.find_by_last_part(row.name):
                by_image.setdefault(name, []).append(row)
        unknown = [row for row in unknown if not images.find_by_last_part(row.name)]
        if by_image:
            name, of_image = next(iter(by_image.items()))
            findings.warn(
                f"{title}: its rows name images in other folders; they are matched by the last part of the name alone: "
                f"{printable(of_image[0].name)} is {printable(name)}."
            )
    left_out = ImageNames(skipped, folder=folder)
    gone = []
    for row in unknown:
        if left_out.find(row.name):
            findings.unused.append(f"{title}, {row.where} ({row.name}): its image is skipped")
        else:
            gone.append(f"{row.where} ({row.name})")
            findings.unused.append(f"{title}, {row.where} ({row.name}): there is no such image")
    if gone:
        without_row = next((name for name in names if name not in by_image), None)
        other_side = f" An image without a row is {without_row}." if without_row else ""
        count = f"no image in the folder for {len(gone)} of its {len(rows)} rows"
        if not by_image:
            count = "no row names an image in the folder"
        findings.warn(f"{title}: {count}: {some(gone)}.{other_side}")
    return by_image


# ---- files that are not read


def _note_sidecars(sidecars: Sidecars, found: FoundCaptions, images: Sequence[str]) -> None:
    """Name the text files that no image takes its caption from."""
    findings = found.findings
    pairs = []
    for file, instead in sidecars.passed_over.items():
        findings.unused.append(f"{file}: {instead} is read instead")
        pairs.append(f"{instead} (not {file})")
    if pairs:
        findings.warn(
            f"two text files for {many(len(pairs), 'image')}; caption_extension, then .txt, then .caption is read: "
            f"{some(pairs)}."
        )
    for file, image in sidecars.of_skipped.items():
        findings.unused.append(f"{file}: its image {image} is skipped")
    for file in sidecars.orphans:
        findings.unused.append(f"{file}: there is no image of this name")
    if sidecars.orphans:
        without = next((image for image in images if image not in sidecars.of_image), None)
        other_side = f" An image without a text file is {without}." if without else ""
        findings.warn(f"no image for {many(len(sidecars.orphans), 'text file')}: {some(sidecars.orphans)}.{other_side}")
    silent = []
    for file, image in sidecars.other_tools.items():
        findings.unused.append(f"{file}: its extension is not the caption_extension")
        if image not in found.captions:
            silent.append(f"{file} for {image}")
    if silent:
        findings.warn(
            f"not read, though {many(len(silent), 'image')} without a caption would need it: {some(silent)}. "
            "Set caption_extension in dataset.json if these are the captions."
        )


def _note_other_files(
    others: Sequence[str], sidecars: Sidecars, found: FoundCaptions, subset: Subset, *, images: Sequence[str]
) -> None:
    """Name every other file, and tables that may have the captions which are missing."""
    known = found.read | {*sidecars.passed_over, *sidecars.other_tools, *sidecars.orphans, *sidecars.of_skipped}
    known |= set(sidecars.of_image.values())
    tables = []
    for name in others:
        if name in known:
            continue
        if subset.metadata_file is not None and METADATA.fullmatch(PurePosixPath(name).name):
            found.findings.unused.append(f"{name}: metadata_file {subset.metadata_file} is read instead")
        else:
            found.findings.unused.append(f"{name}: it is neither an image nor a caption")
        if name.lower().endswith(TABLES):
            tables.append(name)
    silent = [image for image in images if image not in found.captions or not found.captions[image].encoding]
    if tables and silent:
        found.findings.warn(
            f"no caption for {many(len(silent), 'image')}, and {some(tables)} is not read. If the captions are there, "
            "call it metadata.csv, .jsonl or .json, whichever it is, or name it as metadata_file in dataset.json."
        )
