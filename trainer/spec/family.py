"""The interface of a model family, the facts that plans are made from, and the look-up by module name.

A family is a module of `trainer.families` with `FACTS: Facts`, `LORA_KEYS: LoraKeys` and the functions of the
`Family` protocol. Importing it imports no torch, so that plans can be made from its facts in milliseconds; its
functions import what they need. `trainer/families/__init__.py` tells how to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from trainer.spec.plan import Prompt
    from trainer.spec.rules.config_rules import ConfigKind, Rules

PACKAGE = "trainer.families"
FOLDER = Path(__file__).resolve().parents[1] / "families"
SHARED = ("common", "qwen_vae")  # modules in that folder that several families use and that are none themselves
# In a single file with several parts, the names of a part's tensors begin with one of these.
PREFIXES = {
    "denoiser": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "clip_l": ("conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer."),
    "clip_g": ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    "t5": ("text_encoders.t5xxl.transformer.",),
    "qwen3": ("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b.transformer."),
    "qwen2_5_vl": ("text_encoders.qwen25_7b.transformer.",),
    "qwen3_vl": ("text_encoders.qwen3vl_4b.transformer.", "text_encoders.qwen3vl_8b.transformer."),
    "mistral3": ("text_encoders.mistral3_24b.transformer.",),
}
CLIP_TOKENS = 77  # that a CLIP text encoder reads at once, with those of begin and end
OPTIONAL = "optional:"  # begins a pattern of files whose folder may be missing


class MeasuredStep(NamedTuple):
    """The speed of one training step (`python -m bench step`, docs/performance.md)."""

    recompute: str  # a key of trainer.spec.strategies.RECOMPUTE_POLICIES
    images_per_second: float


@dataclass(frozen=True)
class Footprint:
    """The sizes of a full-size model, from which `trainer.spec.memory_model` predicts memory.

    `python -m bench step --family FAMILY …` prints the numbers of weights, and on a GPU the peaks of memory from which
    the GiB were fitted (docs/performance.md). GiB per kilotoken are those of 16-bit activations, for 1,024 tokens.
    """

    block_weights: float  # weights of the linear layers in the blocks: these are quantised
    other_weights: float  # all other weights of the denoiser
    adapter_weights_per_rank: float  # trained weights for each rank, with all targets
    # Numbers of a LoRA file for each rank, with all targets: with kohya's keys; with them, where q, k and v have an
    # adapter each; and with PEFT's (tests/trainer/lora_files/test_precision.py counts them).
    kohya_weights_per_rank: float
    split_kohya_weights_per_rank: float
    peft_weights_per_rank: float
    region_count: int  # modules that `Family.regions` returns
    text_tokens: int  # tokens of a caption; an image has one token for 16 x 16 pixels besides
    caption_values: int  # numbers that the cache has of a caption: of one as long as any, or of usual length
    latent_channels: int  # the cache has a mean and a deviation of each, in fp32, for 8 x 8 pixels
    # GiB per kilotoken that the FP8 forward pass saves for the backward pass, by policy of
    # trainer.engine.memory.checkpointing. "host": what stays on the device while all else is offloaded to the host.
    saved_gib: dict[str, float]
    working_gib: float  # GiB per kilotoken for the intermediate results of the region that is computed
    largest_region_weights: float  # weights of the linear layers in the largest region
    fp8_weights: float  # weights of the layers that multiply in FP8: all in the blocks but the modulations
    encoder_weights: float  # weights of the text encoders
    hidden_size: int  # the shorter side of most linear layers in the blocks
    caption_gib: float = 0.03  # GiB in 16 bits that the text encoders work with for a caption as long as any
    capture_gib: float = 2.5  # GiB that CUDA graphs take besides, where the step recomputes
    graph_gib: float = 0.025  # GiB of the driver for each captured graph (`python -m bench shapes`)
    unfused_factor: float = 1.45  # saved_gib["none"] is this times as large without the norms and GELUs fused for FP8
    # Batch size → steps measured on an H200 in FP8, captured, with torch's own attention, from which the time of a step
    # elsewhere is predicted (entrypoint.planning.step_time). Empty: nothing was measured.
    measured_steps: dict[int, MeasuredStep] = field(default_factory=dict)
    measured_pixels: int = 0  # of each image in those steps


# ---- what a published model's repository holds besides its weights: local weight files then need no repository

Config = dict[str, Any]  # the JSON of a config


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's vocabulary in an open repository, and the config that goes with it."""

    name: str  # for messages
    repository: str  # of the Hub; neither gated nor private
    files: tuple[str, ...]
    config: Config  # tokenizer_config.json, in which base models differ


@dataclass(frozen=True)
class Published:
    """A model's folder in diffusers' layout, without weights."""

    configs: dict[str, Config]  # file in the folder → its JSON
    tokenizers: dict[str, Tokenizer]  # subfolder → what is in it
    # Tensors that tell this model's denoiser from its family's others: original name → shape, or None if it has none.
    marks: dict[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class Lookalike:
    """A model that is none of a family's, though its denoiser has the family's names."""

    what: str  # for messages
    tensor: str  # that it has, by its original name or by diffusers'
    shape: tuple[int | None, ...] | None = None  # of that tensor; None: any
    lacks: tuple[str, ...] = ()  # tensors of a third model, which has `tensor` too


# ---- base models and families


@dataclass(frozen=True)
class Licence:
    """The licence of a base model, which applies to a LoRA of it too. `id`, `name` and `link` as the Hub has them.

    `allows`: one sentence for people, as the licence's own text had it when this was written.
    """

    id: str  # of the Hub's list; "other" where that lacks it
    name: str  # license_name for "other"; else for people
    link: str
    allows: str

    def __str__(self) -> str:
        return f"{self.name} ({self.link}). {self.allows}"


@dataclass(frozen=True)
class BaseModel:
    """A value of BASE_MODEL."""

    source: str  # Hub repository, or the folder of an embedded miniature
    files_gib: float  # size of the downloaded files
    footprint: Footprint | None = None  # None: a miniature, which fits anywhere
    gated: bool = False  # whether the Hub asks for its licence to be accepted
    resolution: int = 1024  # pixels; default of prompts and of dataset.json
    defaults: dict[str, Any] = field(default_factory=dict)  # fields of plan.Prompt that differ from the family's
    aliases: tuple[str, ...] = ()  # further names that people write for it; `source` is one without being listed
    published: Published | None = None  # its configs, for jobs whose weights are local files; None: a miniature
    licence: Licence | None = None  # None: a miniature, which is a part of this program
    caution: str = ""  # why its own weights are no good start for training, with the fix; for a warning of the plan
    # Fields of Facts that are not its family's: where it reads captions by another text encoder. `facts_of` has them.
    own_facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_miniature(self) -> bool:
        """Whether this is a small model for tests and the demo, which trains on a CPU too."""
        return self.footprint is None


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know about a family, without its weights."""

    name: str  # of the family's module
    models: dict[str, BaseModel]  # by value of BASE_MODEL; single files are completed from the first
    files: tuple[str, ...]  # glob patterns of the files that training and sampling need; see OPTIONAL
    multiple: int  # pixels; the sides of images are multiples of this
    objective: str  # flow or denoising, see trainer.training.objective.make_objective
    timestep_samplings: tuple[str, ...]  # the first is the default
    targets: tuple[str, ...]  # suffixes of the names of the linear layers that get adapters
    lora_prefix: str  # the denoiser's name in diffusers' pipeline, which begins the keys of LoRA files
    architecture: str  # modelspec.architecture, without "/lora"
    base_version: str  # ss_base_model_version
    fused_targets: dict[str, tuple[str, ...]]  # fused projection → the separate ones of diffusers' model
    parts: dict[str, str]  # key of PREFIXES → the folder of its weights in diffusers' layout
    landmarks: tuple[str, ...]  # tensors that identify a file with the denoiser alone: original name, diffusers' name
    # Folders of tokenizers → the name of their text encoder and the tokens that it reads of a caption, which are
    # those behind the template's begin; the first that a model has reads the most.
    text_readers: dict[str, tuple[str, int]]
    lookalikes: tuple[Lookalike, ...]  # other models whose files have the names of this family
    pipelines: tuple[str, ...]  # names of the whole model's class in model_index.json
    kinds: dict[
        str, ConfigKind
    ]  # folder of a part → its class, and what its config may say; no other class is ever made
    # Sizes that two parts must have in common, by the values of their configs: two names, and their two values.
    same_sizes: Callable[[Mapping[str, Mapping[str, Any]]], Sequence[tuple[str, str, int, int]]]
    prompt_steps: int  # defaults of a prompt line: --s, --g and --l
    prompt_guidance: float
    prompt_cfg: float
    flow_shift: float = 3.1582  # default of PARAMS_DISCRETE_FLOW_SHIFT
    # Whether regions that have no fused forward passes are compiled where steps are captured in CUDA graphs.
    # docs/lab-notes.md has the measurements.
    compiles: bool = True
    max_token_lengths: tuple[int, ...] = (CLIP_TOKENS,)  # values of PARAMS_MAX_TOKEN_LENGTH; the first is the default
    # A pattern of the name, in small letters, of a file of weights → what such a file is, where its tensors do not tell
    # it from a base model.
    name_cautions: dict[str, str] = field(default_factory=dict)
    hub_tags: tuple[str, ...] = ()  # of a model card on the Hub, by which people find LoRAs of this family
    # What model_index.json may say besides its parts: values that this family's pipeline is made with.
    index_rules: Rules = field(default_factory=dict)
    # Fields of plan.Prompt for a folder whose index says is_distilled, where they differ from the family's.
    distilled_defaults: dict[str, Any] = field(default_factory=dict)
    # For programs that people run with a LoRA: what diffusers' pipeline calls classifier-free guidance, the value there
    # that means none, and how it is given a negative prompt.
    pipeline_cfg: str = "guidance_scale"
    pipeline_cfg_none: float = 1.0
    pipeline_negative: str = "negative_prompt={}"
    # Whether samples go from a negative caption towards the prompt's (--l and --n). False: embedded guidance alone.
    draws_with_cfg: bool = True
    attention_backends: bool = True  # False: it calls torch's attention, whichever backend diffusers is set to
    # Whether captions differ in length, so that attention gets a mask for what fills up the shorter ones.
    masks_captions: bool = False


def weights(*parts: str) -> tuple[str, ...]:
    """Patterns for `Facts.files`: the config and the weights of these folders, but not their fp16 copies.

    Copies are called model.fp16.safetensors, model.fp16-00001-of-00002.safetensors and (older)
    model-00001-of-00002.fp16.safetensors.
    """
    names = ("config.json", "*model.safetensors", "*model-*-of-?????.safetensors", "*model.safetensors.index.json")
    return tuple(f"{part}/{name}" for part in parts for name in names)


def tokenizer_files(*folders: str) -> tuple[str, ...]:
    """Patterns for `Facts.files`: all that is read of these tokenizers, and nothing else."""
    names = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
    return tuple(f"{folder}/{name}" for folder in folders for name in (*names, "special_tokens_map.json"))


@dataclass(frozen=True)
class OriginalLayer:
    """A layer of the model's original implementation, and the layers of diffusers' model that hold its rows."""

    name: str  # dotted path; {} stands for the number of the block
    diffusers_names: tuple[str, ...]  # paths in diffusers' model, with the same {}, in the order of their rows
    row_ratio: tuple[int, ...] = (1,)  # the rows of these layers, as a ratio, so that it holds at any width
    rows_per_column: float = 0.0  # of its weight, at any width; 0: not compared. It tells families of the same names.
    halves_swapped: bool = False  # where its rows are scale and shift (rows = 2 * columns), the other way round


@dataclass(frozen=True)
class ClipOutput:
    """The output of a CLIP text encoder for a batch of captions, as far as diffusers' pipelines use it."""

    tokens_BLD: torch.Tensor  # the hidden states before the last layer
    pooled_BD: torch.Tensor  # with the projection, where the encoder has one


@dataclass(frozen=True)
class LoraKeys:
    """The names that LoRA files of a family use, for `trainer.lora_files`."""

    layers: tuple[OriginalLayer, ...]
    # Text encoder of diffusers' pipeline → its name in kohya's keys: te1 (CLIP-L), te2 (CLIP-G) or te3 (T5). One that
    # no tool trains has the name of its part (a key of PREFIXES).
    encoders: dict[str, str]
    file_formats: tuple[str, ...] = ("kohya",)  # keys of convert.KEY_FORMATS: a job writes a file in each
    dora_formats: tuple[str, ...] = ("kohya", "peft")  # likewise, for DoRA
    other_names: tuple[OriginalLayer, ...] = ()  # further names of layers, which are read and never written
    namesake: str = ""  # a family with the names of this one's blocks: what fits both is its
    not_in_every_block: tuple[str, ...] = ()  # ends of diffusers' names: of layers that some blocks of a list lack
    one_width: bool = False  # whether the shorter side of every linear layer in the blocks is Footprint.hidden_size


class Family(Protocol):
    """The functions of a family module.

    `text`, `negative`: the tensors that `encode_text` returned, with a batch axis. `folder`: a model in diffusers'
    layout. Shapes: B batch, C channels, H and W height and width, f the VAE's factor (8), L tokens, D features.
    """

    FACTS: Facts
    LORA_KEYS: LoraKeys

    def load_encoders(self, folder: Path, *, device: str, dtype: torch.dtype) -> Any:
        """The tokenizers and the frozen text encoders, as one object for `encode_text`.

        It has an attribute for each key of LORA_KEYS.encoders.
        """

    def encode_text(
        self, encoders: Any, captions: list[str], *, max_tokens: int = CLIP_TOKENS
    ) -> list[dict[str, torch.Tensor]]:
        """One dictionary of tensors, without a batch axis and on the CPU, for each caption.

        `max_tokens`: one of `Facts.max_token_lengths`.
        """

    def with_clip_outputs(
        self, text: dict[str, torch.Tensor], outputs: dict[str, ClipOutput]
    ) -> dict[str, torch.Tensor]:
        """`text` with the outputs of the text encoders that train in the places of the cached ones.

        `outputs`: by the names of diffusers' pipeline. Gradients flow through them.
        """

    def load_vae(self, folder: Path, *, device: str) -> Any:
        """The frozen VAE, in fp32."""

    def encode_images(self, vae: Any, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the latents' distribution, (B, 2C, H/f, W/f); pixels in [-1, 1].

        Scaled and shifted as the denoiser is trained on them.
        """

    def load_denoiser(self, folder: Path, *, device: str, dtype: torch.dtype) -> Any:
        """The frozen denoiser."""

    def from_original(self, state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The denoiser's tensors by their names in the original implementation → by those in diffusers' model.

        `config`: of diffusers' model. Tensors may be lazy: only their shapes are known until they are written.
        A name that is unknown stays as it is; the caller refuses it.
        """

    def blocks(self, denoiser: Any) -> list[tuple[str, torch.nn.Module]]:
        """The repeated blocks by name, in order of execution: these get adapters and are quantised."""

    def regions(self, denoiser: Any) -> list[torch.nn.Module]:
        """The modules that are compiled and recomputed in the backward pass one by one: many modules of few classes."""

    def fused_forwards(self) -> dict[type, type]:
        """Classes of modules inside the blocks → subclasses with a fused forward pass for FP8.

        `trainer.engine.fused_linear.install` sets them; empty if there are none.
        """

    def predict(
        self,
        denoiser: Any,
        noisy_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        *,
        text: dict[str, torch.Tensor],
        guidance: float,
        geometry_B6: torch.Tensor,
    ) -> torch.Tensor:
        """The denoiser's output for latents at times `t_B` in [0, 1] (1: pure noise), shaped like `noisy_BCHW`.

        `guidance`: embedded guidance. `geometry_B6`: original size, crop and target size, as `trainer.data.batches`
        makes them. Families may ignore both.
        """

    def sample(
        self,
        denoiser: Any,
        vae: Any,
        folder: Path,
        *,
        prompt: Prompt,
        text: dict[str, torch.Tensor],
        negative: dict[str, torch.Tensor],
        scheduler: dict[str, Any] | None = None,
    ) -> Image.Image:
        """Draw one image with diffusers' pipeline. `scheduler`: values that differ from its scheduler's config."""


@cache
def family_names() -> tuple[str, ...]:
    """All families, by the modules in their folder."""
    modules = pkgutil.iter_modules([str(FOLDER)])
    return tuple(sorted(m.name for m in modules if not m.ispkg and m.name not in SHARED))


def get_family(name: str) -> Family:
    """The module of family `name`. Raises KeyError if there is none."""
    if name not in family_names():
        raise KeyError(name)
    return cast(Family, importlib.import_module(f"{PACKAGE}.{name}"))


def facts_of(name: str, base: str) -> Facts:
    """The facts of family `name`, with what the base model `base` says instead.

    `base`: a value of BASE_MODEL, or anything else for a model that is only known to be of the family.
    """
    facts = get_family(name).FACTS
    model = facts.models.get(base)
    return facts if model is None else replace(facts, **model.own_facts)


def trainable_encoders(name: str) -> dict[str, str]:
    """The CLIP text encoders of family `name`: diffusers' name → te1 (CLIP-L) or te2 (CLIP-G). T5 never trains."""
    encoders = get_family(name).LORA_KEYS.encoders
    return {component: short for component, short in encoders.items() if short in ("te1", "te2")}


def timestep_samplings() -> tuple[str, ...]:
    """The timestep samplings of all families, each once, in order."""
    samplings: dict[str, None] = {}
    for name in family_names():
        samplings |= dict.fromkeys(get_family(name).FACTS.timestep_samplings)
    return tuple(samplings)


def lora_formats(base: str, kind: str) -> tuple[str, ...]:
    """The key names of the LoRA files that a job leaves, the main one first. `kind`: as in LoraPlan."""
    family_name, model = base_models()[base]
    keys = get_family(family_name).LORA_KEYS
    if kind == "dora":
        return keys.dora_formats
    # The second file is for diffusers, which knows kohya's keys at the published models' width and depth only.
    if model.is_miniature and keys.file_formats == ("kohya",):
        return ("kohya", "peft")
    return keys.file_formats


def base_models() -> dict[str, tuple[str, BaseModel]]:
    """Every value of BASE_MODEL → the name of its family, and the model."""
    models: dict[str, tuple[str, BaseModel]] = {}
    for name in family_names():
        for base, model in get_family(name).FACTS.models.items():
            models[base] = (name, model)
    return models
