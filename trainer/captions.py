"""Where captions come from and what is done to them. Standard library only.

The order of the steps is that of sd-scripts' `process_caption`, whose dataset files users bring.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import DataError
from trainer.plan import Subset

LONGEST = 1 << 20  # bytes of a sidecar file; a caption is never that long
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.json")  # found by themselves, in any folder
NAME_KEYS = ("file_name", "image_path")
CAPTION_KEYS = ("caption", "text")
# Unicode noncharacters, which no text holds, stand for the escaped {{ and }}.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class Text:
    """A caption before the pipeline. Lines are stripped, empty ones left out; "" if nothing remains."""

    text: str
    origin: str  # metadata | sidecar | class_tokens
    legacy: bool = False  # not UTF-8: read as Windows-1252 (of which Latin-1's letters are part)


# ---- reading


def decode(data: bytes) -> tuple[str, bool]:
    """Text of a file, and whether it was not Unicode: UTF-8, UTF-16 with a mark, else Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and len(data) % 2 == 0:
        return data.decode("utf-16", errors="replace"), False
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding), encoding != "utf-8-sig"
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), True


def clean(text: str) -> str:
    """Lines stripped, empty lines left out; halves of surrogate pairs, which no encoder takes, become `?`."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    # Not splitlines(), which also parts at characters that a caption may hold.
    return "\n".join(line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip())


def sidecar_names(stem: str, extension: str) -> tuple[str, ...]:
    """The files that may hold the caption of `stem`, the first that exists counts."""
    extension = extension if extension.startswith(".") else f".{extension}"
    return tuple(dict.fromkeys(stem + e for e in (extension, ".txt", ".caption")))


def read_sidecar(path: Path) -> Text:
    """Raises DataError for a file too long to be a caption, or one that cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
    except OSError as problem:
        raise DataError(f"The caption {path} cannot be read: {problem.strerror}.") from problem
    if len(data) > LONGEST:
        raise DataError(f"{path} is more than 1 MiB: not a caption. Remove it, or set caption_extension.")
    text, legacy = decode(data)
    return Text(clean(text), "sidecar", legacy)


def read_metadata(path: Path, subset: Subset) -> dict[str, Text]:
    """Name as the file gives it → caption, of a `.json`, `.jsonl` or `.csv` file. Rows without a caption are left out.

    JSON is `{name: {"caption": …, "tags": …}}`, `{name: caption}` or a list of rows; a row has `file_name` or
    `image_path` and `caption` or `text`, or the columns that the source names. Several rows of one name are several
    lines of one caption. Raises DataError naming the file and the row.
    """
    try:
        text, legacy = decode(path.read_bytes())
    except OSError as problem:
        raise DataError(f"metadata_file {path} cannot be read: {problem.strerror}.") from problem
    found: dict[str, Text] = {}
    for where, row in _rows(path, text):
        names = (subset.source.image_column, *NAME_KEYS)
        name = next((row[k] for k in names if k and row.get(k)), None)
        if not isinstance(name, str):
            raise DataError(f"{where}: no {' or '.join(NAME_KEYS)}.")
        caption = _row_caption(row, subset, where=where)
        if caption is not None:
            before = found.get(name)
            found[name] = Text(f"{before.text}\n{caption}" if before else caption, "metadata", legacy)
    return found


def _rows(path: Path, text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Each row and where it is, for messages."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 2):
            yield f"{path}, row {number}", row
        return
    documents = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for where, document in documents if suffix == ".jsonl" else [(str(path), text)]:
        try:
            value = json.loads(document)
        except ValueError as problem:
            raise DataError(f"{where}: not JSON: {problem}.") from problem
        yield from _json_rows(value, where=where, nested=suffix != ".jsonl")


def _json_rows(value: Any, *, where: str, nested: bool) -> Iterable[tuple[str, dict[str, Any]]]:
    if nested and isinstance(value, dict):
        for name, entry in value.items():
            row = entry if isinstance(entry, dict) else {"caption": entry}
            yield f"{where}, {name!r}", {**row, NAME_KEYS[0]: name}
    elif nested and isinstance(value, list):
        for number, row in enumerate(value, 1):
            yield from _json_rows(row, where=f"{where}, entry {number}", nested=False)
    elif isinstance(value, dict):
        yield where, value
    else:
        raise DataError(f"{where}: not an object with file_name and caption.")


def _row_caption(row: dict[str, Any], subset: Subset, *, where: str) -> str | None:
    """Caption and tags of a row, joined as sd-scripts does; None if it has neither."""
    keys = (subset.source.caption_column, *CAPTION_KEYS)
    key = next((k for k in keys if k and row.get(k) is not None), None)
    if key is None and row.get("tags") is None:
        return None
    caption = clean(_as_text(row[key], joint="\n", where=where)) if key else ""
    tags = clean(_as_text(row.get("tags") or "", joint=", ", where=where)).replace("\n", subset.caption_separator)
    lines = caption.split("\n") if subset.enable_wildcard else [caption]
    return "\n".join(subset.caption_separator.join(part for part in (line, tags) if part) for line in lines)


def _as_text(value: Any, *, joint: str, where: str) -> str:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return joint.join(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: the caption is {value!r}, not a text.")
    return value


def match_names(entries: dict[str, Text], names: Iterable[str], *, folder: Path) -> tuple[dict[str, Text], list[str]]:
    """Captions by picture name (relative to `folder`, with /), and the entries that name no picture.

    An entry may be the name, the name without its suffix, or an absolute path; one from another machine counts by its
    last part.
    """
    by_name: dict[str, list[str]] = {}
    for name in names:
        for key in {name, str(PurePosixPath(name).with_suffix("")), f"/{PurePosixPath(name).name}"}:
            by_name.setdefault(key, []).append(name)
    matched: dict[str, Text] = {}
    unknown = []
    for entry, text in entries.items():
        path = PurePosixPath(entry.replace("\\", "/"))
        key = str(path)
        if path.is_absolute() or re.match(r"[A-Za-z]:/", key):
            key = str(path.relative_to(folder)) if path.is_relative_to(folder) else f"/{path.name}"
        pictures = by_name.get(key, [])
        matched.update(dict.fromkeys(pictures, text))
        if not pictures:
            unknown.append(entry)
    return matched, unknown


# ---- the pipeline


def process(caption: str | None, subset: Subset, *, rng: random.Random, epoch: int, dropout_rate: float = 0.0) -> str:
    """The text trained on in one occurrence of a picture. Pure: all chance comes from `rng`; `epoch` counts from 0."""
    if dropped(subset, rng=rng, epoch=epoch, dropout_rate=dropout_rate):
        return ""
    return compose(caption, subset, rng)


def dropped(subset: Subset, *, rng: random.Random, epoch: int, dropout_rate: float = 0.0) -> bool:
    """Whether the whole caption is dropped. `dropout_rate` is the run's: the higher of it and the subset's counts.

    Every n epochs means that the n-th, 2n-th … go without captions.
    """
    chance = rng.random() < max(subset.caption_dropout_rate, dropout_rate)
    every = subset.caption_dropout_every_n_epochs
    return chance or (every > 0 and (epoch + 1) % every == 0)


def may_drop(subset: Subset, *, dropout_rate: float) -> bool:
    """Whether `dropped` can be true."""
    return max(subset.caption_dropout_rate, dropout_rate) > 0 or subset.caption_dropout_every_n_epochs > 0


def compose(caption: str | None, subset: Subset, rng: random.Random) -> str:
    """The caption with everything done to it but dropping the whole.

    One line (a random one with `enable_wildcard`, else the first) → prefix and suffix → wildcards → kept tokens, the
    rest shuffled and dropped → secondary separator → the trigger word in front if it is not there. Two differences
    from sd-scripts: the line is chosen first, so that no line misses prefix or suffix; and regularisation pictures
    never get the trigger word.
    """
    lines = (caption or "").split("\n")
    line = rng.choice(lines) if subset.enable_wildcard else lines[0]
    text = " ".join(part for part in (subset.caption_prefix, line, subset.caption_suffix) if part)
    if subset.enable_wildcard:
        text = _expand_wildcards(text, rng)
    if subset.shuffle_caption or subset.caption_tag_dropout_rate > 0:
        text = _shuffle(text, subset, rng)
    if subset.secondary_separator:
        text = text.replace(subset.secondary_separator, subset.caption_separator)
    if subset.trigger_word and not subset.is_reg:
        text = _with_trigger(text, subset.trigger_word)
    return text


def varying(subset: Subset) -> tuple[str, ...]:
    """What in this subset's captions is drawn by lot, in words."""
    parts = {
        "wildcards and lines": subset.enable_wildcard,
        "order of tags": subset.shuffle_caption,
        "dropped tags": subset.caption_tag_dropout_rate > 0,
    }
    return tuple(name for name, used in parts.items() if used)


def tag_frequency(captions: Iterable[str | None], separator: str) -> dict[str, int]:
    """How often each tag occurs in the captions, as the header of a LoRA file tells it."""
    tags = (tag.strip() for caption in captions for tag in (caption or "").split("\n")[0].split(separator or ","))
    return dict(Counter(tag for tag in tags if tag))


def _expand_wildcards(text: str, rng: random.Random) -> str:
    """`{a|b}` → a or b; `{{` and `}}` are braces."""
    text = text.replace("{{", OPEN).replace("}}", CLOSE)
    text = re.sub(r"\{([^}]+)\}", lambda match: rng.choice(match.group(1).split("|")), text)
    return text.replace(OPEN, "{").replace(CLOSE, "}")


def _shuffle(text: str, subset: Subset, rng: random.Random) -> str:
    """Keep the first tokens (or those around `keep_tokens_separator`), shuffle and thin out the others."""
    first: list[str] = []
    last: list[str] = []
    parts = text.split(subset.keep_tokens_separator, 2) if subset.keep_tokens_separator else [text]
    if len(parts) > 1:
        first, free, last = (_tokens(part, subset, blank=False) for part in (*parts, "")[:3])
    else:
        tokens = _tokens(text, subset, blank=True)
        first, free = tokens[: subset.keep_tokens], tokens[subset.keep_tokens :]
    if subset.shuffle_caption:
        rng.shuffle(free)
    if subset.caption_tag_dropout_rate > 0:
        free = [token for token in free if rng.random() >= subset.caption_tag_dropout_rate]
    return ", ".join(first + free + last)


def _tokens(text: str, subset: Subset, *, blank: bool) -> list[str]:
    parts = text.strip().split(subset.caption_separator) if subset.caption_separator else [text]
    return [part.strip() for part in parts if blank or part.strip()]


def _with_trigger(text: str, trigger: str) -> str:
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text):
        return text
    return f"{trigger}, {text}" if text else trigger
