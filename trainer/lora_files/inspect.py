"""What a LoRA file contains, for the plan of a job that starts from it: rank, layers, DoRA or not. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainer.lora_files import numbers
from trainer.lora_files.contents import LayerTensors, read_layers
from trainer.lora_files.key_names import key_style, untrained_modules
from trainer.storage.safetensors_header import Header

OF_16_BITS = {"F16": "fp16", "BF16": "bf16"}
MOST_RANK = 4096  # that a job trains; a header that says more is not one of ours
# A rank-one term of a LoRA: (hash of the down matrix, row). Modules whose down matrices are equal share terms.
Term = tuple[str, int]


@dataclass(frozen=True)
class Training:
    """What the header of a file of ours says about the adapters that trained (`metadata.lora_metadata`)."""

    rank: int
    split_qkv: bool
    targets: tuple[str, ...]


@dataclass(frozen=True)
class LoraSummary:
    """The content of a LoRA file, for one family.

    `modules`: those that have an adapter. `unclear`: those of layers that files keep as one (q, k and v) whose up
    matrix is zero, so that it cannot be seen which of them had an adapter.
    """

    family: str
    style: str  # the tool whose keys they are
    modules: dict[str, frozenset[Term]]
    unclear: dict[str, frozenset[Term]]
    sides: dict[str, tuple[int, ...]]  # module → (rows, columns) of its weight, or those and the kernel's
    alphas: tuple[float, ...]  # all different ones; empty: the file has none, so alpha = rank
    without_alpha: int  # number of layers, where others have one
    dora: bool
    training: Training | None

    def rank(self, fused: Iterable[tuple[str, ...]]) -> int:
        """The rank that can hold the file, if modules with the suffixes in each of `fused` share one adapter."""
        suffixes = [(f".{part}", parts[0]) for parts in fused for part in parts]
        groups: dict[str, set[Term]] = {}
        for module, terms in (self.modules or self.unclear).items():
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
        if self.alphas and self.without_alpha:
            alphas += f" ({self.without_alpha} layers without: their alpha is the rank)"
        count = len(self.modules or self.unclear)
        text = f"{self.style} keys, rank {self.rank(())}, {alphas}, {count} modules"
        return f"DoRA, {text}" if self.dora else text


def summarize(header: Header, family_name: str) -> LoraSummary:
    """Read the whole file. Raises ValueError, with the tensor's name, for a file that cannot be read."""
    layers = read_layers(header, family_name)
    modules: dict[str, frozenset[Term]] = {}
    unclear: dict[str, frozenset[Term]] = {}
    sides: dict[str, tuple[int, ...]] = {}
    alphas = set()
    for tensors in layers:
        terms = _terms(header, tensors)
        if terms is None:
            unclear |= dict.fromkeys(tensors.layer.modules, _all_terms(header, tensors))
        else:
            modules |= terms
        sides |= _sides(header, tensors)
        if "alpha" in tensors.keys:
            alphas.add(numbers.scalar(header, header.entries[tensors.keys["alpha"]]))
    for module in untrained_modules(header.metadata):
        modules.pop(module, None)
    styles = [key_style(tensors.stem) for tensors in layers if tensors.layer.original is not None]
    return LoraSummary(
        family=family_name,
        style=max(set(styles), key=styles.count, default="text encoder"),
        modules=modules,
        unclear=unclear,
        sides=sides,
        alphas=tuple(sorted(alphas)),
        without_alpha=sum("alpha" not in tensors.keys for tensors in layers),
        dora=any("magnitude" in tensors.keys for tensors in layers),
        training=_training(header.metadata),
    )


def save_precision(header: Header) -> str:
    """The number format of a file's matrices, as a key of SAVE_PRECISIONS: that of most of its bytes, or fp32."""
    sizes: Counter[str] = Counter()
    for entry in header.entries.values():
        sizes[entry.dtype] += entry.end - entry.begin
    if not sizes:
        return "fp32"
    return OF_16_BITS.get(sizes.most_common(1)[0][0], "fp32")


def _all_terms(header: Header, tensors: LayerTensors) -> frozenset[Term]:
    """The terms of a layer: one for each row of the down matrix, known by the content of the matrix."""
    down = header.entries[tensors.keys["down"]]
    digest = hashlib.sha256(header.read(down, 0, down.end - down.begin)).hexdigest()
    rank = header.entries[tensors.keys["up"]].shape[1]
    return frozenset((digest, i) for i in range(rank))


def _terms(header: Header, tensors: LayerTensors) -> dict[str, frozenset[Term]] | None:
    """The terms of each module of a layer; None if its up matrix is zero and several modules share it.

    Tools that train q, k and v separately stack them block by block: each part's rows of the up matrix are zero in the
    columns of the others, and these are no terms of the part. A part without any term has no adapter.
    """
    layer = tensors.layer
    every = _all_terms(header, tensors)
    if len(layer.modules) == 1 or layer.original is None:
        return dict.fromkeys(layer.modules, every)
    entry = header.entries[tensors.keys["up"]]
    used = numbers.nonzero(numbers.read_bits(header, entry)).reshape(entry.shape[:2])
    is_dora = "magnitude" in tensors.keys
    if not used.any() and not is_dora:
        return None
    unit = len(used) // sum(layer.original.row_ratio)
    top = 0
    terms = {}
    for module, share in zip(layer.modules, layer.original.row_ratio, strict=True):
        bottom = top + unit * share
        columns = {i for i in range(used.shape[1]) if used[top:bottom, i].any()}
        top = bottom
        if columns or is_dora:
            terms[module] = frozenset(term for term in every if term[1] in columns)
    return terms


def _sides(header: Header, tensors: LayerTensors) -> dict[str, tuple[int, ...]]:
    """The shape of the weight of each module: (rows, columns), and the kernel's sides for a convolution."""
    layer = tensors.layer
    down = header.entries[tensors.keys["down"]].shape
    rows = header.entries[tensors.keys["up"]].shape[0]
    kernel = down[2:]
    if "mid" in tensors.keys:
        kernel = header.entries[tensors.keys["mid"]].shape[2:]
    shares: tuple[int, ...] = (1,)
    if layer.original is not None and len(layer.modules) > 1:
        shares = layer.original.row_ratio
    unit = rows // sum(shares)
    return {name: (unit * share, down[1], *kernel) for name, share in zip(layer.modules, shares, strict=True)}


def _training(metadata: Mapping[str, str]) -> Training | None:
    """What a file of ours says; None for files of others, and where it cannot be read."""
    try:
        rank = int(metadata["kiln_rank"])
        split_qkv = json.loads(metadata["kiln_split_qkv"])
        targets = json.loads(metadata["kiln_targets"])
    except (KeyError, ValueError, RecursionError):
        return None
    if (
        not 1 <= rank <= MOST_RANK
        or not isinstance(targets, list)
        or not all(isinstance(target, str) for target in targets)
    ):
        return None
    return Training(rank, bool(split_qkv), tuple(targets))
