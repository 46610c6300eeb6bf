"""Miniatures of captioning models: the real classes with random weights, and an ONNX file written byte by byte.

They say nonsense, and the same nonsense each time.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


WORDS = (
    *("a", "red", "blue", "green", "large", "small", "old", "dog", "can", "sits", "stands", "on", "in", "the"),
    *("under", "grass", "table", "street", "light", "shadow"),
)


def write_tokenizer(folder: Path, special: Sequence[str]) -> dict[str, int]:
    """A tokenizer of bytes and some words; returns the numbers of the special tokens."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = {}
    for word in WORDS:
        for end in range(1, len(word) + 1):
            merges[("Ġ" + word[: end - 1], word[end - 1])] = None
            vocabulary.setdefault("Ġ" + word[:end], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return {token: tokenizer.token_to_id(token) for token in special}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def save(folder: Path, model: Any, seed: int) -> None:
    """The model with weights from `seed`: it answers in words of WORDS alone, which depend on the image."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 4.0 if any(part in name for part in ("projector", "merger", "projection")) else 0.5
            scale = scale if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1))
        rows = model.get_output_embeddings().weight
        quiet = torch.full((len(rows), 1), 0.02)
        for word in WORDS:
            quiet[tokenizer.token_to_id("Ġ" + word)] = 1.0
        rows.mul_(quiet)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def make_florence2(folder: Path, *, seed: int = 1) -> Path:
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    numbers = write_tokenizer(folder, ["<s>", "<pad>", "</s>", "<unk>", "<image>"])
    config = Florence2Config(
        text_config={
            "vocab_size": 512,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": numbers["<s>"],
            "pad_token_id": numbers["<pad>"],
            "eos_token_id": numbers["</s>"],
            "decoder_start_token_id": numbers["</s>"],
            "forced_eos_token_id": numbers["</s>"],
        },
        vision_config={
            "embed_dim": [8, 8, 16, 16],
            "num_heads": [1, 1, 2, 2],
            "num_groups": [1, 1, 2, 2],
            "depths": [1, 1, 1, 1],
            "projection_dim": 16,
            "window_size": 2,
        },
        image_token_id=numbers["<image>"],
    )
    save(folder, Florence2ForConditionalGeneration(config), seed)
    size = {"height": 64, "width": 64}
    values = {"image_processor_type": "CLIPImageProcessor", "size": size, "crop_size": size, "do_center_crop": False}
    write_json(folder / "preprocessor_config.json", {**values, **IMAGENET, "resample": 3, "image_seq_length": 5})
    return folder


def make_llava(folder: Path, *, seed: int = 2) -> Path:
    """As JoyCaption is: SigLIP and Llama 3, with its reserved tokens around the image."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += [f"<|reserved_special_token_{number}|>" for number in (69, 70, 71)]
    numbers = write_tokenizer(folder, special)
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "eos_token_id": numbers["<|eot_id|>"],
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "image_size": 168,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 14,
        },
        image_token_index=numbers["<|reserved_special_token_69|>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=144,
    )
    save(folder, LlavaForConditionalGeneration(config), seed)
    values = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 168, "width": 168}, **HALF}
    write_json(folder / "preprocessor_config.json", {**values, "resample": 3})
    return folder


def make_qwen3_vl(folder: Path, *, seed: int = 3) -> Path:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    numbers = write_tokenizer(folder, [*special, "<|image_pad|>", "<|video_pad|>"])
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 16,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=numbers["<|image_pad|>"],
        video_token_id=numbers["<|video_pad|>"],
        vision_start_token_id=numbers["<|vision_start|>"],
        vision_end_token_id=numbers["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    save(folder, Qwen3VLForConditionalGeneration(config), seed)
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    values = {"image_processor_type": "Qwen2VLImageProcessorFast", "size": size, "patch_size": 16, **HALF}
    write_json(folder / "preprocessor_config.json", {**values, "temporal_patch_size": 2, "merge_size": 2})
    return folder


# ---- ONNX, which is protobuf: a tag (field number and type) before each value (onnx/onnx.proto, github.com/onnx/onnx)


def varint(number: int) -> bytes:
    out = bytearray()
    number &= (1 << 64) - 1
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: int | bytes | str) -> bytes:
    """A whole number, or bytes, text or a message with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, values: np.ndarray) -> bytes:
    """TensorProto: dims, data_type (1 float, 7 int64, 10 float16), name, raw_data."""
    kind = {np.dtype(np.int64): 7, np.dtype(np.float16): 10}.get(values.dtype, 1)
    content = values if kind != 1 else values.astype("<f4")
    dims = b"".join(field(1, side) for side in values.shape)
    return dims + field(2, kind) + field(8, name) + field(9, content.tobytes())


def node(operation: str, inputs: Sequence[str], output: str, **attributes: int) -> bytes:
    """NodeProto; attributes are whole numbers."""
    content = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, operation)
    for name, value in attributes.items():
        content += field(5, field(1, name) + field(3, value) + field(20, 2))
    return content


def value_info(name: str, shape: Sequence[int | str], *, kind: int = 1) -> bytes:
    dims = b""
    for side in shape:
        dims += field(1, field(1, side) if isinstance(side, int) else field(2, side))
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, dims)))


def tagger_weights(tags: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of means over rows and columns: the matrix (2 * side * 3, T) and the bias (T,)."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(2 * side * 3, tags)).astype(np.float32) * 0.002
    return matrix, rng.normal(size=tags).astype(np.float32)


def onnx_model(tags: int, *, side: int, seed: int, batch: int | str = "batch", kind: int = 1) -> bytes:
    """sigmoid(means of columns and rows of a (B, side, side, 3) image, times a matrix, plus a bias).

    `kind` of the numbers: 1 float, 10 float16.
    """
    matrix, bias = tagger_weights(tags, side, seed)
    if kind == 10:
        matrix, bias = matrix.astype(np.float16), bias.astype(np.float16)
    graph = b"".join(
        field(1, one)
        for one in (
            node("ReduceMean", ["input", "rows"], "columns", keepdims=0),
            node("ReduceMean", ["input", "wide"], "lines", keepdims=0),
            node("Concat", ["columns", "lines"], "means", axis=1),
            node("Flatten", ["means"], "flat", axis=1),
            node("MatMul", ["flat", "matrix"], "product"),
            node("Add", ["product", "bias"], "sum"),
            node("Sigmoid", ["sum"], "output"),
        )
    )
    constants = {"rows": np.array([1]), "wide": np.array([2]), "matrix": matrix, "bias": bias}
    graph += field(2, "tagger") + b"".join(field(5, tensor(name, value)) for name, value in constants.items())
    graph += field(11, value_info("input", [batch, side, side, 3], kind=kind))
    graph += field(12, value_info("output", [batch, tags], kind=kind))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 18))


TAGGER_TAGS = (
    ("general", "9"),
    *((name, "0") for name in ("1girl", "long_hair", "^_^", "outdoors", "blue_sky", "text_(object)", "no_humans")),
    *((name, "4") for name in ("hatsune_miku", "saber_(fate)", "pikachu")),
)


def make_tagger(folder: Path, *, side: int = 448, seed: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(onnx_model(len(TAGGER_TAGS), side=side, seed=seed))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["tag_id", "name", "category", "count"])
    for number, (name, category) in enumerate(TAGGER_TAGS):
        writer.writerow([number, name, category, 1000 - number])
    (folder / "selected_tags.csv").write_text(out.getvalue())
    return folder
