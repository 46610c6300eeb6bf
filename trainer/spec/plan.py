"""What will be done: the `Plan`, its JSON form, and its fingerprint. Standard library only: the entrypoint imports it.

A plan is complete: nothing is decided after it, and plan.json alone runs the same job again. Fields marked
*neutral* (paths, names, how often to report) do not change which weights come out, so a resumed run may differ in them.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

VERSION = 2

# Environment variables by which the entrypoint tells a trainer its place among several, and where to keep its deadline.
RANK_VARIABLE = "KILN_RANK"  # number of this process, from 0; absent: the only one
TEAM_VARIABLE = "KILN_TEAM"  # folder that the processes of a job share
ALIVE_VARIABLE = "KILN_ALIVE"  # file in which the first process keeps the deadline of its watchdog

VARIANTS = 8  # crops and colours of a picture, and likewise wordings of its caption, where these vary
T = TypeVar("T")


def neutral(default: Any = dataclasses.MISSING) -> Any:
    """A field that may differ between a run and its continuation."""
    return field(default=default, metadata={"neutral": True})


@dataclass(frozen=True)
class ModelPlan:
    """The frozen base model."""

    base: str  # as asked: flux, flux-schnell, mini-flux ...
    family: str  # a module of trainer.spec.family
    source: str  # Hub repository or local path
    revision: str | None = None  # asked for; `commit` is what was found
    commit: str | None = neutral(None)
    path: str = neutral("")  # local folder in diffusers layout; filled by fetch
    parts: dict[str, str] = field(default_factory=dict)  # key of Facts.parts → file or folder instead; "": without it


def public(url: str) -> str:
    """`url` without user, password, query and fragment, which may be secrets: fit for messages."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True)
class Source:
    """Where pictures come from."""

    kind: str  # folder | archive | hub | generated
    location: str = field(metadata={"told": "public"})  # path, URL, Hub dataset id, or the prompt to generate from
    revision: str | None = None
    split: str = "train"
    image_column: str | None = None  # found if None
    caption_column: str | None = None  # found if None
    count: int = 0  # pictures to generate
    commit: str | None = neutral(None)
    path: str = neutral("")  # local folder of image files; filled by fetch

    @property
    def public(self) -> str:
        """The location as logs and files may tell it."""
        return public(self.location) if "://" in self.location else self.location


@dataclass(frozen=True)
class Subset:
    """One source of pictures and how its captions are made (the keys of dataset.json)."""

    source: Source
    num_repeats: int = 1
    is_reg: bool = False  # regularisation pictures: repeated to match the others, loss times prior_loss_weight
    alpha_mask: bool = False  # the alpha channel weighs the loss
    conditioning_data_dir: str | None = None  # masks of the loss, by the same stem
    metadata_file: str | None = None
    caption_extension: str = ".caption"
    class_tokens: str | None = None
    trigger_word: str | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    shuffle_caption: bool = False
    enable_wildcard: bool = False
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    resize_interpolation: str | None = None  # area down, lanczos up

    @property
    def image_variants(self) -> int:
        """How often a picture is encoded, at most."""
        return VARIANTS if self.random_crop or self.color_aug else 2 if self.flip_aug else 1

    @property
    def caption_variants(self) -> int:
        """How often a caption is encoded, at most."""
        return VARIANTS if self.enable_wildcard or self.shuffle_caption or self.caption_tag_dropout_rate else 1


@dataclass(frozen=True)
class Dataset:
    """Subsets that share a resolution and a batch size. Sizes in pixels."""

    subsets: tuple[Subset, ...]
    resolution: tuple[int, int]  # width, height
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    validation_split: float = 0.0
    validation_seed: int | None = None


@dataclass(frozen=True)
class DataPlan:
    datasets: tuple[Dataset, ...]
    strict: bool = False  # any unusable picture stops the job


@dataclass(frozen=True)
class LoraPlan:
    kind: str = "lora"  # lora, rslora or dora
    rank: int = 32
    alpha: float = 4.0
    split_qkv: bool = False
    targets: tuple[str, ...] = ()  # suffixes of module names
    resume_from: str | None = None  # a LoRA file, or a state folder

    @property
    def scale(self) -> float:
        """What the product of the matrices counts."""
        return self.alpha / (self.rank**0.5 if self.kind == "rslora" else self.rank)


@dataclass(frozen=True)
class OptimPlan:
    name: str = "prodigy"
    learning_rate: float = 1.0
    weight_decay: float = 0.1
    args: dict[str, Any] = field(default_factory=dict)  # complete keyword arguments besides lr and weight_decay
    scheduler: str = "constant"
    warmup_steps: int = 0
    num_cycles: int = 1
    text_encoders: dict[str, float] = field(default_factory=dict)  # a CLIP encoder that trains too → learning rate


@dataclass(frozen=True)
class TrainPlan:
    seed: int = 42
    max_epochs: int = 5
    max_steps: int | None = None  # overrides max_epochs; optimiser steps
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0  # 0: no clipping
    timestep_sampling: str = "sigmoid"
    discrete_flow_shift: float = 3.1582
    loss_weighting: str = "none"
    prediction_type: str = "auto"  # auto: as the model's scheduler says
    zero_terminal_snr: bool | None = None  # None: likewise
    min_snr_gamma: float = 0.0  # 0: off
    guidance_scale: float = 1.0
    noise_offset: float = 0.1
    caption_dropout_rate: float = 0.0
    prior_loss_weight: float = 1.0
    ema_decay: float = 0.0  # 0: off
    max_loss_spike: float = 10.0  # a step with a loss of more than this many times the usual is skipped; 0: none is
    max_skipped_steps: int = neutral(3)


@dataclass(frozen=True)
class EnginePlan:
    device: str = "cpu"  # a torch device type
    num_gpus: int = 1  # processes that train together, each on a device of its own
    precision: str = "fp32"  # an entry of trainer.spec.weight_formats
    dtype: str = "float32"  # torch's name of what activations are computed in
    recompute: str = neutral(
        "none"
    )  # a key of trainer.engine.memory.checkpointing.POLICIES: what the backward pass computes again
    kept_blocks: int = neutral(0)  # blocks that keep everything, whatever `recompute` says
    offload: str = neutral("none")  # a key of trainer.spec.strategies.OFFLOADS: what waits in the host's memory
    turned_weights: bool = neutral(False)  # a copy of 8-bit weights, turned round for the backward pass, is kept
    stream_encoders: bool = neutral(False)  # the text encoders' layers come to the device one by one
    host_gib: float | None = neutral(None)  # of the host's memory that weights may take; None: any
    tile_vae: bool = neutral(False)  # samples are decoded piece by piece, and pictures encoded one by one
    compile: bool = neutral(False)
    replay: bool = neutral(False)  # steps are recorded and replayed as a whole, where nothing waits on the host
    attention: str = neutral(
        "native"
    )  # an attention backend of diffusers, or flash_4 (trainer.engine.attention.flash_attention_4)
    memory_limit_gib: float | None = neutral(None)
    step_timeout_s: float | None = neutral(None)  # None: by the usual time of a step; 0: no limit


@dataclass(frozen=True)
class OutputPlan:
    path: str
    name: str
    cache: str
    started: int = 0  # Unix seconds of the first start; goes into the LoRA's header
    save_every: int = 100  # optimiser steps; 0: only at the end
    sample_every: int = 200
    validate_every: int = 0
    keep_checkpoints: int = 3


@dataclass(frozen=True)
class Prompt:
    """One picture to draw. Sizes in pixels."""

    text: str
    width: int
    height: int
    seed: int
    steps: int
    guidance: float  # embedded guidance, where the family has it
    cfg: float  # classifier-free guidance; 1.0: none
    negative: str = ""


@dataclass(frozen=True)
class Plan:
    model: ModelPlan
    data: DataPlan
    lora: LoraPlan
    optim: OptimPlan
    train: TrainPlan
    engine: EnginePlan
    output: OutputPlan = field(metadata={"neutral": True})
    prompts: tuple[Prompt, ...] = field(default=(), metadata={"neutral": True})
    reasons: tuple[str, ...] = field(default=(), metadata={"neutral": True})  # why each `auto` became what it is
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Raises ValueError for anything but the JSON of a plan of this version."""
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            raise ValueError(f"not a plan of version {VERSION}")
        return _build(Plan, raw, where="plan")

    def map_sources(self, change: Callable[[Source, Dataset], Source]) -> Plan:
        """This plan with `change(source, dataset)` in the place of each source; `dataset` is the one that holds it."""
        datasets = []
        for dataset in self.data.datasets:
            subsets = []
            for subset in dataset.subsets:
                subsets.append(dataclasses.replace(subset, source=change(subset.source, dataset)))
            datasets.append(dataclasses.replace(dataset, subsets=tuple(subsets)))
        return dataclasses.replace(self, data=dataclasses.replace(self.data, datasets=tuple(datasets)))

    def essence(self) -> dict[str, Any]:
        """Flat `section.field` → value of all that decides which weights come out."""
        flat: dict[str, Any] = {}
        _flatten(self, "", flat)
        return flat


def _flatten(value: Any, name: str, into: dict[str, Any]) -> None:
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            if not f.metadata.get("neutral"):
                _flatten(getattr(value, f.metadata.get("told", f.name)), f"{name}.{f.name}".lstrip("."), into)
    elif isinstance(value, (tuple, list)) and any(dataclasses.is_dataclass(v) for v in value):
        for i, v in enumerate(value):
            _flatten(v, f"{name}[{i}]", into)
    else:
        into[name] = list(value) if isinstance(value, tuple) else value


def _build(kind: Any, raw: Any, *, where: str) -> Any:
    """`raw` (from JSON) as the annotated type `kind`: dataclasses, tuples, dicts, unions with None, plain values."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(raw, dict) or raw.keys() - hints.keys():
            raise ValueError(f"{where}: unknown fields or not an object")
        try:
            return typing.cast(Any, kind)(**{k: _build(hints[k], v, where=f"{where}.{k}") for k, v in raw.items()})
        except TypeError as problem:
            raise ValueError(f"{where}: {problem}") from problem
    if origin is tuple:
        if not isinstance(raw, list):
            raise ValueError(f"{where}: {raw!r} is not a list")
        kinds = [args[0]] * len(raw) if args[-1] is Ellipsis else args
        return tuple(_build(k, v, where=where) for k, v in zip(kinds, raw, strict=True))
    if origin in (types.UnionType, typing.Union):
        return None if raw is None else _build(next(a for a in args if a is not type(None)), raw, where=where)
    if kind is Any:
        return raw
    if origin is dict:
        if not isinstance(raw, dict):
            raise ValueError(f"{where}: {raw!r} is not an object")
        return {key: _build(args[1], value, where=f"{where}.{key}") for key, value in raw.items()}
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
        raise ValueError(f"{where}: {raw!r} is not {kind.__name__}")
    return raw
