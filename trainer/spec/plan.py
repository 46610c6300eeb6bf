"""The `Plan` of a job, its JSON form, and its essence. Standard library only: the entrypoint imports it.

A plan is complete: nothing is decided after it, and plan.json alone runs the same job again. Fields marked *neutral*
(paths, names, how often to report) do not change which weights come out, so a resumed run may differ in them. All other
fields make up the plan's essence (`Plan.essence`), which a state keeps.

The names of the fields are a file format: a job that runs while Kiln is updated resumes from its old plan.json and
states. So fields are not renamed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trainer.spec.messages.secrets import address

VERSION = 2

# Environment variables by which the entrypoint tells a trainer its place among several.
RANK_VARIABLE = "KILN_RANK"  # number of this process, from 0; absent: the only one
TEAM_VARIABLE = "KILN_TEAM"  # folder that the processes of a machine share
FIRST_NODE_VARIABLE = "KILN_FIRST_NODE"  # address of the first machine; absent: the only one

AUTO = -1  # a number that the trainer chooses once it knows the images (trainer.spec.rules.automatic)
VARIANTS = 8  # of an image with random crops or colours, and of a caption with random wording
T = TypeVar("T")


def neutral(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that may differ when a run is resumed."""
    return field(default=default, metadata={"neutral": True})


@dataclass(frozen=True)
class ModelPlan:
    """The frozen base model."""

    base: str  # BASE_MODEL: flux, flux-schnell, mini-flux ...
    family: str  # a module of trainer.spec.family
    source: str  # Hub repository or local path
    revision: str | None = None  # MODEL_REVISION; `commit` is what the Hub resolved it to
    commit: str | None = neutral(None)
    path: str = neutral("")  # local folder in diffusers layout; filled by fetch
    # Key of Facts.parts → file or folder to take instead; "": without that part.
    parts: dict[str, str] = field(default_factory=dict)
    # A LoRA that is part of the weights while they train: a file, or one of the Hub (owner/name/file.safetensors).
    training_adapter: str | None = None
    training_adapter_path: str = neutral("")  # its local file; filled by fetch


def public(url: str) -> str:
    """`url` without user, password, query and fragment, which may be secrets: fit for messages."""
    return address(url)


@dataclass(frozen=True)
class Source:
    """Where images come from."""

    kind: str  # folder | archive | bucket | hub | generated
    # Path, URL, Hub dataset id, or the prompt to generate from. The essence has it without secrets.
    location: str = field(metadata={"essence_from": "public"})
    revision: str | None = None
    split: str = "train"
    subset: str | None = None  # configuration of a Hub dataset; None: its default
    image_column: str | None = None  # None: found by its type
    caption_column: str | None = None  # None: found by its name
    count: int = 0  # images to generate
    commit: str | None = neutral(None)
    path: str = neutral("")  # local folder of image files; filled by fetch
    # Where the user has named it, for messages: a subset of dataset.json; "": DATASET_NAME. No part of what it is.
    named_in: str = field(default="", compare=False, metadata={"neutral": True})

    @property
    def public(self) -> str:
        """The location without secrets: fit for logs and files."""
        return public(self.location) if "://" in self.location else self.location


@dataclass(frozen=True)
class Subset:
    """One source of images and how its captions are made (the keys of dataset.json)."""

    source: Source
    num_repeats: int = 1
    is_reg: bool = False  # regularisation images: repeated to match the others, loss times prior_loss_weight
    alpha_mask: bool = False  # the alpha channel weighs the loss
    conditioning_data_dir: str | None = None  # masks of the loss, by the same stem
    metadata_file: str | None = None
    caption_extension: str = ".caption"
    class_tokens: str | None = None
    # Whether the model of `DataPlan.captioner` captions images that have none, and what it is asked. The caption itself
    # is part of the images' fingerprint.
    auto_caption: bool = neutral(True)
    caption_prompt: str | None = neutral(None)
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
    resize_interpolation: str | None = None  # None: area to shrink, lanczos to enlarge
    # The user has set num_repeats: it wins over a number in a folder's name (trainer.data.folders.conventions).
    repeats_chosen: bool = neutral(False)
    # Of a subset that such a name makes during the scan: the number of the subset whose folder it is in, and where. No
    # plan.json has one, and the essence leaves it out: the fingerprint of the images has what the names say.
    part_of: int | None = neutral(None)
    folder: str | None = neutral(None)

    @property
    def image_variants(self) -> int:
        """How many versions of an image are encoded, at most."""
        if self.random_crop or self.color_aug:
            return VARIANTS
        return 2 if self.flip_aug else 1

    @property
    def caption_variants(self) -> int:
        """How many versions of a caption are encoded, at most."""
        varies = self.enable_wildcard or self.shuffle_caption or self.caption_tag_dropout_rate
        return VARIANTS if varies else 1


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
class CaptionerPlan:
    """The model that captions images without a caption (CAPTION_WITH). What it writes is in the fingerprint."""

    source: str  # Hub repository or local folder
    revision: str | None = None
    commit: str | None = None  # filled by fetch
    path: str = ""  # local folder; filled by fetch. "": every caption is known already
    max_tokens: int = 256  # of a caption, by the model's own tokenizer
    words: int = 120  # that it is asked for
    overwrite: bool = False  # CAPTION_OVERWRITE: also images that have a caption
    write: bool = False  # CAPTION_WRITE: beside the images as well

    @property
    def name(self) -> str:
        """For reports and the page, which have no paths of this machine."""
        return self.source.rstrip("/").rpartition("/")[2] if self.source.startswith("/") else self.source


@dataclass(frozen=True)
class DataPlan:
    datasets: tuple[Dataset, ...]
    strict: bool = False  # any unusable image stops the job
    captioner: CaptionerPlan | None = field(default=None, metadata={"neutral": True})

    @property
    def subsets(self) -> list[Subset]:
        """Those of all datasets, in their order."""
        subsets: list[Subset] = []
        for dataset in self.datasets:
            subsets += dataset.subsets
        return subsets


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
        """Factor of B·A: alpha / rank, or alpha / √rank for rsLoRA (arXiv:2312.03732)."""
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
    max_epochs: int = 5  # or AUTO
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
    max_loss_spike: float = 10.0  # a step is skipped whose loss is this many times the largest recent one; 0: off
    max_skipped_steps: int = neutral(3)
    max_token_length: int = 77  # tokens of a caption that CLIP text encoders read: 77, or 150 or 225 in chunks


@dataclass(frozen=True)
class EnginePlan:
    device: str = "cpu"  # a torch device type
    num_gpus: int = 1  # processes of each machine that train together, each on a device of its own
    nodes: int = 1  # machines
    precision: str = "fp32"  # an entry of trainer.spec.weight_formats
    dtype: str = "float32"  # torch's name of what activations are computed in
    # What the backward pass recomputes: a key of trainer.engine.memory.checkpointing.POLICIES.
    recompute: str = neutral("none")
    kept_blocks: int = neutral(0)  # blocks that keep everything, whatever `recompute` says
    # What is kept in the host's memory, or on the other GPUs: a key of trainer.spec.strategies.OFFLOADS.
    offload: str = neutral("none")
    turned_weights: bool = neutral(False)  # a transposed copy of 8-bit weights is kept for the backward pass
    stream_encoders: bool = neutral(False)  # the text encoders' layers are streamed to the device one by one
    host_gib: float | None = neutral(None)  # of the host's memory that weights may take; None: any
    tile_vae: bool = neutral(False)  # samples are decoded in tiles, and images encoded one by one
    compile: bool = neutral(False)
    replay: bool = neutral(False)  # steps are captured as CUDA graphs, where no weights are streamed
    # An attention backend of diffusers, or flash_4 (trainer.engine.attention.flash_attention_4).
    attention: str = neutral("native")
    deterministic: bool = neutral(False)  # only kernels that give the same bits each time
    memory_limit_gib: float | None = neutral(None)
    step_timeout_s: float | None = neutral(None)  # None: by the usual time of a step; 0: no limit

    @property
    def processes(self) -> int:
        """That train together, on all machines."""
        return self.num_gpus * self.nodes


@dataclass(frozen=True)
class OutputPlan:
    path: str
    name: str
    cache: str
    started: int = 0  # Unix seconds of the first start; goes into the LoRA's header
    save_every: int = 100  # optimiser steps; 0: only at the end; or AUTO
    sample_every: int = 200  # 0: none; or AUTO
    validate_every: int = 0
    keep_checkpoints: int = 3  # states and LoRA files of saves, the newest; AUTO: all LoRA files and two states
    save_precision: str = "fp16"  # of LoRA files: a key of trainer.spec.weight_formats.SAVE_PRECISIONS
    requested: str = ""  # OUTPUT_NAME; empty: not set. `name` may have a number besides
    folder: str = ""  # of this run below `path`: see trainer.storage.run_records
    resume_with_changes: bool = False  # RESUME_WITH_CHANGES
    max_cache_bytes: int | None = neutral(None)  # that encoded images may take; None: what is free at CACHE_PATH
    window_bytes: int = neutral(0)  # of encoded images at a time (`trainer.job.rolling.rolling_cache`); 0: all of them
    sample_strengths: tuple[float, ...] = ()  # of the LoRA besides 1, at which the last samples are drawn too


@dataclass(frozen=True)
class Prompt:
    """One image to sample. Sizes in pixels."""

    text: str
    width: int
    height: int
    seed: int
    steps: int
    guidance: float  # embedded guidance, where the family has it
    cfg: float  # classifier-free guidance; 1.0: none
    negative: str = ""


@dataclass(frozen=True)
class QuotePlan:
    """What the planner predicts for this hardware, in seconds (0: not known), and what limits time and cost."""

    card: str = ""
    batch_s: tuple[float, ...] = ()  # forward and backward pass of a micro-batch, for each dataset; (): not predicted
    round_s: float = 0.0  # drawing a sample of each prompt
    start_s: float = 0.0  # to the first step, with everything on this machine, without encoding
    image_s: float = 0.0  # encoding an image and its caption
    caption_s: float = 0.0  # captioning an image by a model (CAPTION_WITH)
    captioner_s: float = 0.0  # loading that model
    price_per_hour: float | None = None  # of all machines of the job
    limit_hours: float | None = None  # of MAX_RUNTIME or MAX_COST, whichever comes first
    limit: str = ""  # that one in words


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
    reasons: tuple[str, ...] = neutral(())  # why each `auto` became what it is
    details: tuple[str, ...] = neutral(())  # ways that were not taken, for who asks
    automatic: tuple[str, ...] = neutral(())  # variables that the hardware decides, since they are `auto`
    warnings: tuple[str, ...] = neutral(())  # what the job does, but probably nobody wants
    given: tuple[str, ...] = neutral(())  # the variables that the user has set
    quote: QuotePlan = field(default_factory=QuotePlan, metadata={"neutral": True})
    printed: tuple[str, ...] = neutral(())  # lines about the images that the log has already
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
        """`section.field` → value, for every field that decides which weights come out. JSON values only."""
        flat: dict[str, Any] = {}
        datasets = []
        for dataset in self.data.datasets:
            asked = tuple(subset for subset in dataset.subsets if subset.part_of is None)
            datasets.append(dataclasses.replace(dataset, subsets=asked))
        data = dataclasses.replace(self.data, datasets=tuple(datasets))
        _flatten(dataclasses.replace(self, data=data), "", into=flat)
        return flat


def _flatten(value: Any, name: str, *, into: dict[str, Any]) -> None:
    """Add the fields of `value`, which is called `name`, to `into`."""
    if dataclasses.is_dataclass(value):
        for field_ in dataclasses.fields(value):
            if field_.metadata.get("neutral"):
                continue
            content = getattr(value, field_.metadata.get("essence_from", field_.name))
            _flatten(content, f"{name}.{field_.name}".lstrip("."), into=into)
    elif isinstance(value, (tuple, list)) and any(dataclasses.is_dataclass(item) for item in value):
        for i, item in enumerate(value):
            _flatten(item, f"{name}[{i}]", into=into)
    else:
        into[name] = list(value) if isinstance(value, tuple) else value


@functools.cache  # typing evaluates the annotations of a class anew at each call
def _field_types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(annotation: Any, raw: Any, *, where: str) -> Any:
    """`raw` (from JSON) as its annotated type: dataclasses, tuples, dicts, unions with None, plain values.

    `where`: the field, for the ValueError that is raised if `raw` is anything else.
    """
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        hints = _field_types(typing.cast(type, annotation))
        if not isinstance(raw, dict) or raw.keys() - hints.keys():
            raise ValueError(f"{where}: unknown fields or not an object")
        try:
            fields = {name: _build(hints[name], value, where=f"{where}.{name}") for name, value in raw.items()}
            return typing.cast(Any, annotation)(**fields)
        except TypeError as problem:
            raise ValueError(f"{where}: {problem}") from problem
    if origin is tuple:
        if not isinstance(raw, list):
            raise ValueError(f"{where}: {raw!r} is not a list")
        element_types = [args[0]] * len(raw) if args[-1] is Ellipsis else args
        return tuple(_build(element, value, where=where) for element, value in zip(element_types, raw, strict=True))
    if origin in (types.UnionType, typing.Union):
        if raw is None:
            return None
        not_none = next(arg for arg in args if arg is not type(None))
        return _build(not_none, raw, where=where)
    if annotation is Any:
        return raw
    if origin is dict:
        if not isinstance(raw, dict):
            raise ValueError(f"{where}: {raw!r} is not an object")
        return {key: _build(args[1], value, where=f"{where}.{key}") for key, value in raw.items()}
    # In Python, True is an int.
    if annotation is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if not isinstance(raw, annotation) or (annotation is int and isinstance(raw, bool)):
        raise ValueError(f"{where}: {raw!r} is not {annotation.__name__}")
    return raw
