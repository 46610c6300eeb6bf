"""What a LoRA file contains, read from its header alone: family, rank, layers, DoRA or not. Needs no torch.

The planner reads PARAMS_RESUME_FROM with it in milliseconds: names, shapes and a few values, never whole tensors.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainer.lora_files.key_names import Layer, find_layer, key_style, split_key, untrained_modules
from trainer.spec.family import OriginalLayer, family_names, get_family
from trainer.storage.safetensors_header import Entry, Header

# struct's format of the types that an alpha may have; bfloat16 is the upper half of a float32.
SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
SAMPLED_BYTES = 1 << 16  # of a down matrix; equal beginnings count as equal matrices
SAMPLED_ROWS = 8  # of each part of an up matrix; these tell which columns are not zero

# A rank-one term of a LoRA: (hash of the down matrix, row). Modules whose down matrices are equal share terms.
Term = tuple[str, int]


@dataclass(frozen=True)
class LoraSummary:
    """The content of a LoRA file, for one family."""

    family: str
    style: str  # the tool whose keys they are
    modules: dict[str, frozenset[Term]]
    alphas: tuple[float, ...]  # all different ones; empty: the file has none, so alpha = rank
    unmatched: tuple[str, ...]  # keys of no layer
    dora: bool

    def rank(self, fused: Iterable[tuple[str, ...]]) -> int:
        """The rank that can hold the file, if modules with the suffixes in each of `fused` share one adapter."""
        suffixes = [(f".{part}", parts[0]) for parts in fused for part in parts]
        groups: dict[str, set[Term]] = {}
        for module, terms in self.modules.items():
            name = module
            for suffix, first in suffixes:
                if module.endswith(suffix):
                    name = f"{module.removesuffix(suffix)} {first}"
                    break
            groups.setdefault(name, set()).update(terms)
        return max((len(terms) for terms in groups.values()), default=0)

    def __str__(self) -> str:
        alphas = "no alpha"
        if self.alphas:
            alphas = f"alpha {', '.join(f'{a:g}' for a in self.alphas[:4])}"
        text = f"{self.style} keys, rank {self.rank(())}, {alphas}, {len(self.modules)} modules"
        return f"DoRA, {text}" if self.dora else text


def summarize(header: Header, family_name: str) -> LoraSummary:
    """Read the names, and the few values that reveal ranks and alphas. Raises ValueError for an odd type of alpha."""
    stems: dict[str, dict[str, Entry]] = {}
    unmatched = []
    for key, entry in header.entries.items():
        split = split_key(key)
        if split is None or find_layer(split[0], family_name) is None:
            unmatched.append(key)
        else:
            stem, role = split
            stems.setdefault(stem, {})[role] = entry
    modules: dict[str, frozenset[Term]] = {}
    for stem, entries in stems.items():
        layer = find_layer(stem, family_name)
        if layer is None or not {"down", "up"} <= entries.keys():
            unmatched.append(stem)
        elif "magnitude" in entries and entries["magnitude"].shape[:1] != entries["up"].shape[:1]:
            unmatched.append(f"{stem}.dora_scale of columns")
        else:
            modules |= _terms(header, layer, entries)
    for module in untrained_modules(header.metadata):
        modules.pop(module, None)
    alphas = {_scalar(header, entries["alpha"]) for entries in stems.values() if "alpha" in entries}
    styles = [key_style(stem) for stem in stems if not stem.startswith(("lora_te", "text_encoder"))]
    return LoraSummary(
        family=family_name,
        style=max(set(styles), key=styles.count, default="text encoder"),
        modules=modules,
        alphas=tuple(sorted(alphas)),
        unmatched=tuple(unmatched),
        dora=any("magnitude" in entries for entries in stems.values()),
    )


def _terms(header: Header, layer: Layer, entries: dict[str, Entry]) -> dict[str, frozenset[Term]]:
    """The terms of each module of `layer`.

    Tools that train q, k and v separately stack them block by block: each part's rows of the up matrix are zero in the
    columns of the others, and these are no terms of the part.
    """
    down = entries["down"]
    up = entries["up"]
    rank = 0
    if down.shape:
        rank = down.shape[0]
    digest = hashlib.sha256(header.read(down, 0, SAMPLED_BYTES)).hexdigest()
    if len(layer.modules) == 1 or layer.original is None or len(up.shape) != 2 or not up.shape[0]:
        return {module: frozenset((digest, i) for i in range(rank)) for module in layer.modules}
    used_columns = _used_columns(header, up, layer.original, rank)
    if not any(used_columns):  # training has not begun: every term belongs to every part
        used_columns = [set(range(rank))] * len(used_columns)
    terms = {}
    for module, columns in zip(layer.modules, used_columns, strict=True):
        terms[module] = frozenset((digest, i) for i in sorted(columns))
    return terms


def _used_columns(header: Header, up: Entry, original: OriginalLayer, rank: int) -> list[set[int]]:
    """The columns of the up matrix that are not zero in the rows of each part of the layer."""
    row_count, column_count = up.shape
    itemsize = (up.end - up.begin) // (row_count * max(1, column_count))
    unit = row_count // sum(original.row_ratio)
    top = 0
    used_columns = []
    for share in original.row_ratio:
        height = unit * share
        sampled = range(top, top + height, max(1, height // SAMPLED_ROWS))
        rows = [header.read(up, row * column_count * itemsize, column_count * itemsize) for row in sampled]
        used = set()
        for i in range(rank):
            if any(_not_zero(row[i * itemsize : (i + 1) * itemsize]) for row in rows):
                used.add(i)
        used_columns.append(used)
        top += height
    return used_columns


def _not_zero(number: bytes) -> bool:
    """Whether a little-endian float is not 0 or -0."""
    return any(number[:-1]) or bool(number[-1:] and number[-1] & 0x7F)


def _scalar(header: Header, entry: Entry) -> float:
    """A number in a file. Raises ValueError for a type that is not in SCALARS."""
    raw = header.read(entry, 0, 8)
    if entry.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw[:2])[0])
    layout = SCALARS.get(entry.dtype)
    if layout is None or len(raw) < struct.calcsize(layout):
        raise ValueError(f"it has an alpha of type {entry.dtype}, which is not supported")
    return float(struct.unpack(layout, raw[: struct.calcsize(layout)])[0])


def declared_family(metadata: Mapping[str, str]) -> str | None:
    """The family that the header names in modelspec.architecture; None if it names none that is known."""
    declared = metadata.get("modelspec.architecture", "")
    for name in family_names():
        if declared.startswith(get_family(name).FACTS.architecture):
            return name
    return None


def likely_family(stems: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """The family whose layers the stems name; None if they name none of any family.

    Families share names. Among those with the most matches the header decides; without one, the family of whose layers
    the file has the larger share.
    """
    all_stems = list(stems)
    declared = declared_family(metadata)
    scores: dict[str, tuple[int, bool, float]] = {}
    for name in family_names():
        layers = [layer for stem in all_stems if (layer := find_layer(stem, name))]
        originals = {layer.original.name for layer in layers if layer.original}
        scores[name] = (len(layers), declared == name, len(originals) / len(get_family(name).LORA_KEYS.layers))
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best][0] else None
