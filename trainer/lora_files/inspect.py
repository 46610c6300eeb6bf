"""What a LoRA file contains, read from its header alone: family, rank, layers, kind of adapter."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainer.lora_files.key_names import SCALARS, Layer, find_layer, key_style, split_key
from trainer.spec.family import family_names, get_family
from trainer.storage.safetensors_header import Entry, Header


@dataclass(frozen=True)
class LoraSummary:
    """What a LoRA file has, as a family sees it."""

    family: str
    style: str
    # Module → its terms of rank one: (down matrix, row). Modules whose down matrices are equal share terms.
    modules: dict[str, frozenset[tuple[str, int]]]
    alphas: tuple[float, ...]  # all that there are; empty: none, which means alpha = rank
    unmatched: tuple[str, ...]  # keys
    dora: bool  # whether rows get lengths of their own

    def rank(self, fused: Iterable[tuple[str, ...]]) -> int:
        """The rank that holds the file, where modules with the ends in each of `fused` get one adapter together."""
        groups: dict[str, set[tuple[str, int]]] = {}
        for module, terms in self.modules.items():
            ends = ((f".{part}", parts[0]) for parts in fused for part in parts)
            name = next((module.removesuffix(end) + f" {first}" for end, first in ends if module.endswith(end)), module)
            groups.setdefault(name, set()).update(terms)
        return max((len(terms) for terms in groups.values()), default=0)

    def __str__(self) -> str:
        alphas = f"alpha {', '.join(f'{a:g}' for a in self.alphas[:4])}" if self.alphas else "no alpha"
        kind = "DoRA, " if self.dora else ""
        return f"{kind}{self.style} keys, rank {self.rank(())}, {alphas}, {len(self.modules)} modules"


def summarize(header: Header, family_name: str) -> LoraSummary:
    """Read the names, and the few values that ranks and alphas are known by."""
    stems: dict[str, dict[str, Entry]] = {}
    unmatched = []
    for key, entry in header.entries.items():
        found = split_key(key)
        if found is None or find_layer(found[0], family_name) is None:
            unmatched.append(key)
        else:
            stems.setdefault(found[0], {})[found[1]] = entry
    modules: dict[str, frozenset[tuple[str, int]]] = {}
    for stem, entries in stems.items():
        there = find_layer(stem, family_name)
        if there is None or not {"down", "up"} <= entries.keys():
            unmatched.append(stem)
        elif "magnitude" in entries and entries["magnitude"].shape[:1] != entries["up"].shape[:1]:
            unmatched.append(f"{stem}.dora_scale of columns")
        else:
            modules |= _terms(header, there, entries)
    alphas = {_scalar(header, e["alpha"]) for e in stems.values() if "alpha" in e}
    dora = any("magnitude" in e for e in stems.values())
    styles = [key_style(stem) for stem in stems if not stem.startswith(("lora_te", "text_encoder"))]
    common = max(set(styles), key=styles.count, default="text encoder")
    return LoraSummary(family_name, common, modules, tuple(sorted(alphas)), tuple(unmatched), dora)


def _terms(header: Header, there: Layer, entries: dict[str, Entry]) -> dict[str, frozenset[tuple[str, int]]]:
    """The terms of each module in `there`. Parts that are stacked block by block have zeros in
    the columns of the others."""
    down, up = entries["down"], entries["up"]
    rank = down.shape[0] if down.shape else 0
    same = hashlib.sha256(header.read(down, 0, 1 << 16)).hexdigest()
    if len(there.modules) == 1 or there.original is None or len(up.shape) != 2 or not up.shape[0]:
        return {module: frozenset((same, i) for i in range(rank)) for module in there.modules}
    width = (up.end - up.begin) // (up.shape[0] * max(1, up.shape[1]))  # bytes of a number
    unit, top, used = up.shape[0] // sum(there.original.row_ratio), 0, []
    for share in there.original.row_ratio:
        rows = range(top, top + unit * share, max(1, unit * share // 8))  # a few tell which columns are not zero
        read = [header.read(up, row * up.shape[1] * width, up.shape[1] * width) for row in rows]
        used.append({i for i in range(rank) if any(_not_zero(r[i * width : (i + 1) * width]) for r in read)})
        top += unit * share
    whole = set(range(rank)) if not any(used) else set()  # an adapter that has not begun to train
    return {m: frozenset((same, i) for i in sorted(u or whole)) for m, u in zip(there.modules, used, strict=True)}


def _not_zero(number: bytes) -> bool:
    """Whether a little-endian float is not 0 or -0."""
    return any(number[:-1]) or bool(number[-1:] and number[-1] & 0x7F)


def _scalar(header: Header, entry: Entry) -> float:
    raw = header.read(entry, 0, 8)
    if entry.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw[:2])[0])
    kind = SCALARS.get(entry.dtype)
    if kind is None or len(raw) < struct.calcsize(kind):
        raise ValueError(f"an alpha of it is of type {entry.dtype}, which is not read")
    return float(struct.unpack(kind, raw[: struct.calcsize(kind)])[0])


def declared_family(metadata: Mapping[str, str]) -> str | None:
    """The family that the header names; None if it names none that is known."""
    said = metadata.get("modelspec.architecture", "")
    return next((name for name in family_names() if said.startswith(get_family(name).FACTS.architecture)), None)


def likely_family(stems: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """The family whose layers the module names are; None if they are nobody's.

    Families share names. Then the header decides; without one, the family of whose layers the file has the larger part.
    """
    asked, said = list(stems), declared_family(metadata)
    scores: dict[str, tuple[int, bool, float]] = {}
    for name in family_names():
        found = [there for stem in asked if (there := find_layer(stem, name))]
        covered = {there.original.name for there in found if there.original}
        scores[name] = (len(found), said == name, len(covered) / len(get_family(name).LORA_KEYS.layers))
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best][0] else None
