"""The names in LoRA files: which tool's spelling a key has, and which layer it means. Standard library only.

Every spelling leads to a module of diffusers' pipeline, `<component>.<path>`: transformer.norm_out.linear, or
text_encoder.text_model.encoder.layers.0.mlp.fc1. The families' tables (`Keys`) say how original names relate to these.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trainer.families import Native, family, names

# How a file spells the two matrices and the strength of a module. The longest ending that fits counts.
ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# What comes before the name of a denoiser's layer, and who writes such files.
STYLES = {
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
    "diffusion_model.": "ComfyUI",
    "base_model.model.": "PEFT",
    "transformer.": "diffusers",
    "unet.": "diffusers",
    "": "bare names",
}
CLIPS = {"te_": "te1", "te1_": "te1", "te2_": "te2", "te3_": "te3"}
COMFY_ENCODERS = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}
CLIP_LAYER = re.compile(r"(?:text_model_)?encoder_layers_(\d+)_(self_attn|mlp)_([qkv]_proj|out_proj|fc1|fc2)")
T5_LAYER = re.compile(r"encoder_block_(\d+)_layer_(\d)_(SelfAttention|DenseReluDense)_(q|k|v|o|wi_0|wi_1|wi|wo)")
# struct's letter for the types that an alpha comes in; bfloat16 is the upper half of a float32.
SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library


@dataclass(frozen=True)
class Layer:
    """What a key names: a layer of the original model, one of its parts by diffusers' name, or a text encoder's."""

    component: str  # transformer, unet, text_encoder, text_encoder_2 …
    native: Native | None  # None: a text encoder's layer, which has one name everywhere
    number: str  # of the block
    part: int | None  # an index of native.parts; None: the whole, with its rows as the original has them
    path: str = ""  # of a text encoder's layer

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of diffusers' pipeline that this is, in the order of the rows."""
        if self.native is None:
            return (f"{self.component}.{self.path}",)
        parts = self.native.parts if self.part is None else self.native.parts[self.part : self.part + 1]
        return tuple(f"{self.component}.{p.replace('{}', self.number)}" for p in parts)


def role(key: str) -> tuple[str, str] | None:
    """A key → the name of its module as the file spells it, and down, up, alpha or magnitude; None for others."""
    ending = max((e for e in ROLES if key.endswith(e)), key=len, default=None)
    return None if ending is None else (key[: -len(ending)], ROLES[ending])


def layer(stem: str, family_name: str) -> Layer | None:
    """What the module name `stem` of a file means in a family; None if nothing."""
    return _encoder_layer(stem, family_name) or _denoiser_layer(stem, family_name)


def in_files(module: str, family_name: str) -> str:
    """The module's name as files have it: with the level `text_model` that transformers leaves out."""
    there = layer(module, family_name)
    return there.modules[0] if there is not None and there.native is None else module


def style(stem: str) -> str:
    """Who spells module names like this."""
    if ".processor." in stem:
        return "diffusers before PEFT"
    return next(s for prefix, s in STYLES.items() if stem.startswith(prefix))


def _denoiser_layer(stem: str, family_name: str) -> Layer | None:
    prefix = next(p for p in STYLES if stem.startswith(p))
    path = stem.removeprefix(prefix).replace(".processor.", ".")
    if ".processor." in stem and path.endswith(".to_out"):
        path += ".0"
    found = _numbered(path.replace(".", "_"), _index(family_name))
    component = family(family_name).FACTS.lora_prefix
    return Layer(component, found[0], found[2], found[1]) if found else None


@cache
def _index(family_name: str) -> dict[str, tuple[Native, int | None]]:
    """Every name of the family's layers with _ for dots, original and diffusers', → the layer and the part."""
    found: dict[str, tuple[Native, int | None]] = {}
    for native in family(family_name).KEYS.layers:
        found[native.name.replace(".", "_")] = native, None
        for i, part in enumerate(native.parts):
            found[part.replace(".", "_")] = native, i
    return found


def _numbered(name: str, index: Mapping[str, tuple[Native, int | None]]) -> tuple[Native, int | None, str] | None:
    """Look `name` up as it is, and with each of its numbers as that of the block."""
    if name in index:
        return *index[name], ""
    for number in re.finditer(r"\d+", name):
        template = f"{name[: number.start()]}{{}}{name[number.end() :]}"
        if template in index:
            return *index[template], number[0]
    return None


def _encoder_layer(stem: str, family_name: str) -> Layer | None:
    components = {kohya: component for component, kohya in family(family_name).KEYS.encoders.items()}
    if short := next((c for c in CLIPS if stem.startswith(f"lora_{c}")), None):
        component, path = components.get(CLIPS[short], ""), stem.removeprefix(f"lora_{short}")
    elif stem.startswith("text_encoders."):
        which, _, path = stem.removeprefix("text_encoders.").partition(".")
        component, path = components.get(COMFY_ENCODERS.get(which, ""), ""), path.removeprefix("transformer.")
    else:
        component, _, path = stem.partition(".")
    if component not in components.values():
        return None
    flat = path.replace(".", "_")
    if clip := CLIP_LAYER.fullmatch(flat):
        # transformers 5 leaves text_model out of the path; every other tool's file has it.
        return Layer(component, None, clip[1], None, f"text_model.encoder.layers.{clip[1]}.{clip[2]}.{clip[3]}")
    if t5 := T5_LAYER.fullmatch(flat):
        return Layer(component, None, t5[1], None, f"encoder.block.{t5[1]}.layer.{t5[2]}.{t5[3]}.{t5[4]}")
    return None


# ---- what a file is, from its header


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte of the file
    end: int


@dataclass(frozen=True)
class Header:
    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def read(self, entry: Entry, begin: int, size: int) -> bytes:
        """`size` bytes of a tensor at most, from its byte `begin` on."""
        with self.path.open("rb") as file:
            file.seek(entry.begin + begin)
            return file.read(max(0, min(size, entry.end - entry.begin - begin)))


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises ValueError with what is wrong with it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError("it is not a safetensors file, or it was cut off")
            raw = json.loads(file.read(length))
        metadata = raw.pop("__metadata__", {})
        entries = {
            key: Entry(e["dtype"], tuple(e["shape"]), *(8 + length + offset for offset in e["data_offsets"]))
            for key, e in raw.items()
        }
        if any(type(n) is not int or n < 0 for e in entries.values() for n in (*e.shape, e.begin, e.end)):
            raise TypeError("a size that is not a whole number")
    except OSError as problem:
        raise ValueError(f"it cannot be read: {problem.strerror}") from problem
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, AttributeError, KeyError, TypeError) as problem:
        raise ValueError("its safetensors header is damaged") from problem
    if any(e.end > size for e in entries.values()):
        raise ValueError("it was cut off")
    return Header(path, metadata, entries)


@dataclass(frozen=True)
class Survey:
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


def survey(header: Header, family_name: str) -> Survey:
    """Read the names, and the few values that ranks and alphas are known by."""
    stems: dict[str, dict[str, Entry]] = {}
    unmatched = []
    for key, entry in header.entries.items():
        found = role(key)
        if found is None or layer(found[0], family_name) is None:
            unmatched.append(key)
        else:
            stems.setdefault(found[0], {})[found[1]] = entry
    modules: dict[str, frozenset[tuple[str, int]]] = {}
    for stem, entries in stems.items():
        there = layer(stem, family_name)
        if there is None or not {"down", "up"} <= entries.keys():
            unmatched.append(stem)
        elif "magnitude" in entries and entries["magnitude"].shape[:1] != entries["up"].shape[:1]:
            unmatched.append(f"{stem}.dora_scale of columns")
        else:
            modules |= _terms(header, there, entries)
    alphas = {_scalar(header, e["alpha"]) for e in stems.values() if "alpha" in e}
    dora = any("magnitude" in e for e in stems.values())
    styles = [style(stem) for stem in stems if not stem.startswith(("lora_te", "text_encoder"))]
    common = max(set(styles), key=styles.count, default="text encoder")
    return Survey(family_name, common, modules, tuple(sorted(alphas)), tuple(unmatched), dora)


def _terms(header: Header, there: Layer, entries: dict[str, Entry]) -> dict[str, frozenset[tuple[str, int]]]:
    """The terms of each module in `there`. Parts that were stacked block by block have zeros in the others' columns."""
    down, up = entries["down"], entries["up"]
    rank = down.shape[0] if down.shape else 0
    same = hashlib.sha256(header.read(down, 0, 1 << 16)).hexdigest()
    if len(there.modules) == 1 or there.native is None or len(up.shape) != 2 or not up.shape[0]:
        return {module: frozenset((same, i) for i in range(rank)) for module in there.modules}
    width = (up.end - up.begin) // (up.shape[0] * max(1, up.shape[1]))  # bytes of a number
    unit, top, used = up.shape[0] // sum(there.native.rows), 0, []
    for share in there.native.rows:
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


def said_family(metadata: Mapping[str, str]) -> str | None:
    """The family that the header names; None if it names none that is known."""
    said = metadata.get("modelspec.architecture", "")
    return next((name for name in names() if said.startswith(family(name).FACTS.architecture)), None)


def likely_family(stems: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """The family whose layers the module names are; None if they are nobody's.

    Families share names. Then the header decides; without one, the family of whose layers the file has the larger part.
    """
    asked, said = list(stems), said_family(metadata)
    scores: dict[str, tuple[int, bool, float]] = {}
    for name in names():
        found = [there for stem in asked if (there := layer(stem, name))]
        covered = {there.native.name for there in found if there.native}
        scores[name] = (len(found), said == name, len(covered) / len(family(name).KEYS.layers))
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best][0] else None
