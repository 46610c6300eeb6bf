"""Time to caption images by models of the sizes that CAPTION_WITH names: the figures behind the captions of a quote.

    python -m bench captions
    python -m bench captions --only qwen3-vl joycaption
    python -m bench captions --model FOLDER

Without `--model`, a model with the published sizes and random numbers is written to a temporary folder (up to 17 GB):
how long it takes depends on no weight's value. Each gets `--batch` images of 2 megapixels, and answers in 16 and in 80
tokens. `token_s`: seconds for a token of all images of a batch together; `image_s`: for all else of an image (decoding
it, its pixels through the image encoder, its tokens through the language model); `load_s`: reading the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bench.report import Report
from trainer.captioning import kinds
from trainer.captioning.captioning import LARGEST_PIXELS
from trainer.captioning.vision_language import VisionLanguage
from trainer.spec.plan import EnginePlan
from trainer.spec.rules.captioners import BATCH, CLASSES, FLORENCE2, LLAVA, QWEN3_VL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW, MANY = 16, 80  # tokens of an answer
REPEATS = 3
SPECIAL = {
    FLORENCE2: ("<s>", "<pad>", "</s>", "<unk>", "<image>"),
    QWEN3_VL: ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    LLAVA: (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        *("<|reserved_special_token_69|>", "<|reserved_special_token_70|>", "<|reserved_special_token_71|>"),
    ),
}
IMAGE_TOKEN = {FLORENCE2: "<image>", QWEN3_VL: "<|image_pad|>", LLAVA: "<|reserved_special_token_69|>"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*SIZES], default=[*SIZES])
    parser.add_argument("--model", type=Path, help="a folder with a model that CAPTION_WITH takes")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--markdown", type=Path)
    flags = parser.parse_args(arguments)
    report = Report("Captions", flags.markdown)
    if flags.model is not None:
        report.row(measure(flags.model, flags.model.name, batch=flags.batch))
        return
    for name in flags.only:
        with tempfile.TemporaryDirectory() as folder:
            report.row(measure(write_model(Path(folder), *SIZES[name]), name, batch=flags.batch))


def measure(folder: Path, name: str, *, batch: int) -> dict[str, Any]:
    """The row of one model."""
    engine = EnginePlan(device=DEVICE, dtype="bfloat16" if DEVICE == "cuda" else "float32")
    began = time.monotonic()
    model = VisionLanguage(folder, engine, variable="--model")
    load_s = time.monotonic() - began
    images = pictures(batch)
    few, many = seconds(model, images, FEW), seconds(model, images, MANY)
    token_s = (many - few) / (MANY - FEW)
    row: dict[str, Any] = {"model": name, "weights": kinds.weight_count(folder), "way": model.way.describe()}
    row |= {"batch": batch, "load_s": round(load_s, 1), "token_s": round(token_s, 4)}
    row["image_s"] = round((few - FEW * token_s) / batch, 4)
    del model
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return row


def pictures(count: int) -> list[Image.Image]:
    """Noise of the largest size that a model gets."""
    side = int(LARGEST_PIXELS**0.5)
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def seconds(model: VisionLanguage, images: Sequence[Image.Image], tokens: int) -> float:
    """Of answers to all images in so many tokens: the least of some, after one that warms up."""
    taken = []
    for _ in range(1 + REPEATS):
        began = time.monotonic()
        model.captions(images, "bench", prompt="plain", max_tokens=tokens, check_in=lambda: None)
        taken.append(time.monotonic() - began)
    return min(taken[1:])


def write_model(folder: Path, kind: str, text: dict[str, Any], vision: dict[str, Any]) -> Path:
    """A folder with a model of the kind and the sizes, as CAPTION_WITH takes it."""
    import transformers

    numbers = write_tokenizer(folder, SPECIAL[kind])
    own: dict[str, Any] = {"image_token_id": numbers[IMAGE_TOKEN[kind]]}
    if kind == LLAVA:
        own = {"image_token_index": numbers[IMAGE_TOKEN[kind]], "vision_feature_layer": -1}
        own["vision_feature_select_strategy"] = "full"
    configuration = getattr(transformers, CLASSES[kind].replace("ForConditionalGeneration", "Config"))
    with torch.device(DEVICE):
        config = configuration(text_config=text, vision_config=vision, **own)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = getattr(transformers, CLASSES[kind])(config)
        finally:
            torch.set_default_dtype(usual)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]), encoding="utf-8")
    return folder


def write_tokenizer(folder: Path, special: Sequence[str]) -> dict[str, int]:
    """A tokenizer of single bytes; returns the numbers of the special tokens."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return {token: int(tokenizer.token_to_id(token) or 0) for token in special}


MIDDLE = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PROCESSORS: dict[str, dict[str, Any]] = {
    FLORENCE2: {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"height": 768, "width": 768},
        "crop_size": {"height": 768, "width": 768},
        "do_center_crop": False,
        "image_seq_length": 577,
        "resample": 3,
        **MIDDLE,
    },
    QWEN3_VL: {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        **MIDDLE,
    },
    LLAVA: {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 384, "width": 384},
        "resample": 3,
        **MIDDLE,
    },
}


@dataclasses.dataclass(frozen=True)
class _Florence:
    """The sizes in which the two published models differ."""

    width: int
    layers: int
    heads: int
    stages: tuple[int, ...]

    def sizes(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Its kind, and the configs of its two parts."""
        text = {"vocab_size": 51289, "d_model": self.width, "max_position_embeddings": 4096}
        for side in ("encoder", "decoder"):
            text |= {f"{side}_layers": self.layers, f"{side}_attention_heads": self.heads}
            text[f"{side}_ffn_dim"] = 4 * self.width
        heads = [width // 32 for width in self.stages]
        vision = {"embed_dim": [*self.stages], "num_heads": heads, "num_groups": heads, "depths": [1, 1, 9, 1]}
        return FLORENCE2, text, {**vision, "projection_dim": self.width, "window_size": 12}


def _qwen3_vl(width: int, inner: int, vision: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {"vocab_size": 151936, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 36}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_scaling": rope}
    vision = {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304, "out_hidden_size": width, **vision}
    return QWEN3_VL, text, vision


# As the configs of the repositories in `captioners.SHORT_NAMES` have them.
SIZES = {
    "florence-2": _Florence(768, 6, 12, (128, 256, 512, 1024)).sizes(),
    "florence-2-large": _Florence(1024, 12, 16, (256, 512, 1024, 2048)).sizes(),
    "qwen3-vl": _qwen3_vl(
        2560,
        9728,
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "qwen3-vl-8b": _qwen3_vl(
        4096,
        12288,
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
    ),
    "joycaption": (
        LLAVA,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "image_size": 384,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
    ),
}
