"""How long a model takes to caption an image (CAPTION_WITH): predicted from its size, the card and a caption's length.

A caption is made token by token. For each, the weights are read once for a whole batch, and the host starts the
kernels of each layer: whichever takes longer decides, and on a fast card that is the host. What comes before, an image
through the encoder and its tokens through the language model, are products with the weights. `python -m bench captions`
measures both, and what loading takes. The constants are from models of the published sizes on an H200, and right to a
factor of two (tests/entrypoint/planning/captions/test_caption_time.py).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from entrypoint.system.hardware import Hardware
from entrypoint.system.speeds import Speed, speed_of
from trainer.base_model import configs
from trainer.captioning import kinds
from trainer.data.scan import MAX_CPU_WORKERS
from trainer.spec.errors import SettingsError
from trainer.spec.plan import CaptionerPlan
from trainer.spec.rules import captioners
from trainer.spec.rules.captioners import FLORENCE2, LLAVA, QWEN3_VL, TAGGER, Size

LAYER_S = 0.0013  # in which the host starts the kernels of a layer, for a token
IMAGE_TOKENS = {FLORENCE2: 577, QWEN3_VL: 2025, LLAVA: 729, TAGGER: 1025}  # of the largest image that a model gets
QUESTION_TOKENS = 100
PRODUCTS = 0.3  # the share of a card's 16-bit TFLOP/s that they reach
HOST_S = 0.1  # reading, decoding and scaling an image of many megapixels
LOADED_BYTES_PER_S = 1e9
CORE_FLOPS = 4e10  # a core's products in fp32: taggers run there
# Bytes that are moved for a weight and a token. In nf4, each product makes 16 bits of the weights, and reads these.
MOVED = {"16": 2.0, "nf4": 0.5625 + 2.0 + 2.0}


class CaptionTimes(NamedTuple):
    """Seconds; 0: not known."""

    image: float = 0.0
    load: float = 0.0


def caption_times(captioner: CaptionerPlan | None, hardware: Hardware) -> CaptionTimes:
    """What captioning an image takes on this hardware, and loading the model."""
    size = size_of(captioner) if captioner is not None else None
    if captioner is None or size is None:
        return CaptionTimes()
    if size.kind == TAGGER:
        cores = min(MAX_CPU_WORKERS, hardware.cpu_count)
        products = 2.0 * size.weights * IMAGE_TOKENS[TAGGER] / (cores * CORE_FLOPS)
        return CaptionTimes(HOST_S + products, 4.0 * size.weights / LOADED_BYTES_PER_S)
    speed = speed_of(hardware)
    if speed is None:
        return CaptionTimes()
    # An answer is rarely longer than the words that it is asked for, and its batch waits for the longest.
    tokens = min(captioner.max_tokens, captioner.words / captioners.WORDS_PER_TOKEN)
    return _language_model(size, tokens, speed, memory_gib=hardware.memory_gib)


def _language_model(size: Size, tokens: float, speed: Speed, *, memory_gib: float) -> CaptionTimes:
    """`tokens`: of a caption."""
    way = "16" if captioners.needed_bytes(size.weights, 2.0) <= memory_gib * 2**30 else "nf4"
    moved = size.weights * MOVED[way] / (speed.gb_s * 1e9)
    token_s = max(size.layers * LAYER_S, moved)
    read = IMAGE_TOKENS[size.kind] + QUESTION_TOKENS
    products = 2.0 * size.weights * read / (PRODUCTS * speed.tflops_16 * 1e12)
    return CaptionTimes(
        HOST_S + products + tokens * token_s / captioners.BATCH, 2.0 * size.weights / LOADED_BYTES_PER_S
    )


def size_of(captioner: CaptionerPlan) -> Size | None:
    """The size of a model that has a short name, or is a folder.

    None for a folder that holds no model, or a damaged one: `preflight` names that together with all other problems.
    """
    if not captioner.path:
        return captioners.SIZES.get(captioner.source)
    try:
        return _size_in(Path(captioner.path), kinds.named(captioner))
    except (SettingsError, OSError):
        return None


@cache
def _size_in(folder: Path, variable: str) -> Size | None:
    """The size of the model in a folder. Raises SettingsError, or OSError, for one that cannot be read.

    Read once: a plan is made for each machine on offer.
    """
    kind = kinds.kind_of(folder, variable=variable)
    if kind == TAGGER:
        return Size(kind, (folder / captioners.ONNX).stat().st_size // 4, 0)
    text = configs.read_object(folder / captioners.CONFIG).get("text_config")
    layers = None
    if isinstance(text, dict):
        layers = text.get("decoder_layers" if kind == FLORENCE2 else "num_hidden_layers")
    if not isinstance(layers, int):
        return None
    return Size(kind, kinds.weight_count(folder), layers)
