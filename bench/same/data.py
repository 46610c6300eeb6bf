"""The files that the jobs read: images of many kinds, captions, masks, archives, and a made-up graphics card.

All are made from nothing but the concept's images, so that both trees train on the same bytes.
"""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

FEW = 5  # images of the concept that most jobs train on: encoding takes longer than their few steps
EXIF_ORIENTATION = 0x0112
NOON = (2024, 1, 1, 12, 0, 0)  # of all files in an archive, whose bytes must not depend on the clock

# Stands for torch in the runs that ask for a plan on made-up cards: entrypoint reads the version that torch was built
# for, and the trainer's import of torch hands over the plan that it was given.
STAND_IN_TORCH = """
import os
import shutil
import sys

if len(sys.argv) > 1 and sys.argv[1].endswith("plan.json"):
    shutil.copy(sys.argv[1], os.environ["SAME_PLAN"])
    os._exit(0)
raise ImportError("this is no torch")
"""
STAND_IN_VERSION = '__version__ = "2.13.0"\ncuda = "13.0"\nhip = None\n'
STAND_IN_NVIDIA_SMI = '#!/bin/sh\nprintf "%s\\n" "$SAME_CARDS"\n'

PROMPTS = """# two prompts
a kilnpot on a purple background --w 64 --h 64 --s 2 --d 11
a big red circle --w 96 --h 64 --s 2 --g 2.5 --l 3 --n blurry, text
"""
GENERAL = {"resolution": 128, "enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 32}


def write_data(folder: Path, concept: Path) -> None:
    """Fill the empty `folder`; `concept` has the miniatures' training images."""
    folder.mkdir(parents=True)
    shutil.copytree(concept, folder / "concept")
    _write_few(folder / "few", concept)
    _write_messy(folder / "messy", folder / "masks")
    _write_class_images(folder / "reg")
    _write_archive(folder / "few.zip", folder / "few")
    _write_broken(folder)
    _write_lora_like(folder)
    _write_stand_ins(folder / "stand-ins")
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "prompts-bad.txt").write_text("# comment\na cat --w 128\na dog --q 3\n --w 64\na cow --w many\n")
    (folder / "tags.json").write_text(json.dumps(tags_config(folder), indent=1))
    (folder / "lines.json").write_text(json.dumps(lines_config(folder), indent=1))


def tags_config(data: Path) -> dict[str, object]:
    """Captions as tags that are shuffled and dropped; alpha as a mask; flips, colours and crops; validation."""
    tags = {
        "image_dir": str(data / "messy"),
        "shuffle_caption": True,
        "keep_tokens": 1,
        "caption_tag_dropout_rate": 0.2,
        "caption_prefix": "a drawing of",
        "caption_suffix": "plain",
        "secondary_separator": ";;;",
        "alpha_mask": True,
        "flip_aug": True,
        "color_aug": True,
        "random_crop": True,
        "num_repeats": 2,
    }
    return {"general": GENERAL, "datasets": [{"batch_size": 2, "validation_split": 0.2, "subsets": [tags]}]}


def lines_config(data: Path) -> dict[str, object]:
    """Two datasets: wildcards, masks beside the images, regularisation images (given, and drawn), a metadata file."""
    lines = {
        "image_dir": str(data / "messy"),
        "conditioning_data_dir": str(data / "masks"),
        "enable_wildcard": True,
        "caption_dropout_rate": 0.1,
        "caption_dropout_every_n_epochs": 3,
    }
    given = {"image_dir": str(data / "reg"), "is_reg": True, "class_tokens": "a pot", "num_repeats": 2}
    drawn = {"class_prompt": "a red circle", "num_class_images": 2}
    small = {
        "resolution": [96, 64],
        "bucket_no_upscale": True,
        "resize_interpolation": "bilinear",
        "subsets": [{"image_dir": str(data / "few"), "metadata_file": str(data / "few-captions.json")}],
    }
    return {"general": GENERAL, "datasets": [{"batch_size": 2, "subsets": [lines, given, drawn]}, small]}


def _write_few(folder: Path, concept: Path) -> None:
    folder.mkdir()
    captions = {}
    for path in sorted(concept.glob("*.png"))[:FEW]:
        shutil.copy(path, folder / path.name)
        shutil.copy(path.with_suffix(".txt"), folder)
        captions[path.name] = {"caption": f"the pot of {path.stem}", "tags": ["clay", "bands"]}
    folder.with_name("few-captions.json").write_text(json.dumps(captions))


def drawn(width: int, height: int, seed: int) -> Image.Image:
    """Two gradients and an ellipse, whose place and colour depend on `seed`."""
    rng = np.random.default_rng(seed)
    pixels_HWC = np.zeros((height, width, 3), np.uint8)
    pixels_HWC[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    pixels_HWC[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    image = Image.fromarray(pixels_HWC)
    left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
    colour = tuple(int(value) for value in rng.integers(0, 256, 3))
    ImageDraw.Draw(image).ellipse((left, top, left + width // 3, top + height // 3), fill=colour)
    return image


def _write_messy(folder: Path, masks: Path) -> None:
    """Eleven usable images of many shapes and formats and one that is not, with captions of every kind."""
    (folder / "deep").mkdir(parents=True)
    drawn(200, 120, 1).save(folder / "wide.png")
    drawn(96, 160, 2).save(folder / "tall.png")
    drawn(300, 90, 3).save(folder / "panorama.webp", lossless=True)
    drawn(64, 200, 4).convert("L").save(folder / "grey.png")
    drawn(150, 150, 5).convert("CMYK").save(folder / "print.jpg", quality=95)
    drawn(128, 128, 6).quantize(16).save(folder / "palette.png")
    sixteen_bits_HW = np.linspace(0, 65535, 120 * 100).astype(np.uint16).reshape(100, 120)
    Image.fromarray(sixteen_bits_HW).save(folder / "sixteen-bits.png")
    transparent = drawn(140, 100, 7).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((140, 100)))
    transparent.save(folder / "transparent.png")
    turned = Image.Exif()
    turned[EXIF_ORIENTATION] = 6
    drawn(160, 96, 8).save(folder / "deep" / "turned.jpg", exif=turned, quality=95)
    drawn(40, 56, 9).save(folder / "deep" / "small.bmp")
    drawn(100, 260, 10).save(folder / "deep" / "listed.png")
    (folder / "broken.png").write_bytes((folder / "wide.png").read_bytes()[:400])
    captions: dict[str, bytes] = {
        "wide.txt": b"pot, red, big;;;round, left side",
        "tall.txt": "\ufeffa tall {red|blue|green} pot\r\na pot in {{braces}}\r\n".encode(),
        "panorama.txt": "a caf\xe9, tag one, tag two".encode("cp1252"),
        "grey.caption": b"grey, wide, old",
        "print.txt": "プリント, ポット, 赤".encode(),
        "palette.txt": b"",
        "sixteen-bits.txt": b"one line\n\n  another line  \nthird",
        "transparent.txt": b"a " + b"very " * 90 + b"long caption, end",
        "deep/turned.txt": "turned, upright".encode("utf-16"),
    }
    for name, content in captions.items():
        (folder / name).write_bytes(content)
    listed = {"file_name": "listed.png", "text": "from a metadata file"}
    (folder / "deep" / "metadata.jsonl").write_text(json.dumps(listed) + "\n")
    _write_masks(masks, folder)


def _write_masks(folder: Path, images: Path) -> None:
    """One for each usable image, upright and of its shape."""
    (folder / "deep").mkdir(parents=True)
    for index, path in enumerate(sorted(images.rglob("*"))):
        if path.suffix in (".png", ".jpg", ".webp", ".bmp") and path.name != "broken.png":
            with Image.open(path) as image:
                size = ImageOps.exif_transpose(image).size
            mask = Image.radial_gradient("L").rotate(15 * index).resize(size)
            mask.save((folder / path.relative_to(images)).with_suffix(".png"))


def _write_class_images(folder: Path) -> None:
    folder.mkdir()
    for seed in range(3):
        drawn(128, 112 + 16 * seed, 20 + seed).save(folder / f"{seed}.png")


def _write_archive(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.writestr(zipfile.ZipInfo(f"inside/{file.name}", NOON), file.read_bytes())
    with zipfile.ZipFile(path.with_name("escapes.zip"), "w") as archive:
        archive.writestr(zipfile.ZipInfo("../escapes.png", NOON), (folder / "01.png").read_bytes())


def _write_broken(folder: Path) -> None:
    """Datasets and models that cannot be used."""
    (folder / "broken").mkdir()
    (folder / "broken" / "a.png").write_bytes(b"")
    (folder / "broken" / "b.jpg").write_text("not an image")
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("no image here")
    (folder / "silent").mkdir()
    for seed in range(2):
        drawn(96, 96, 30 + seed).save(folder / "silent" / f"{seed}.png")
    shutil.copytree(folder / "few", folder / "bad-metadata")
    (folder / "bad-metadata" / "metadata.jsonl").write_text('{"file_name": "01.png", "text": 7}\n')
    (folder / "a-file").write_text("a file")
    (folder / "model.ckpt").write_bytes(b"anything")
    (folder / "model.gguf").write_bytes(b"anything")
    (folder / "no-model").mkdir()
    (folder / "bad.json").write_text('{"datasets": [')
    (folder / "bad.toml").write_text("datasets = [")
    (folder / "latin.json").write_bytes('{"general": "\xe9"}'.encode("latin-1"))


def _write_lora_like(folder: Path) -> None:
    """Safetensors files that are damaged, no LoRA, or a LoRA for another family; written by hand."""
    (folder / "garbage.safetensors").write_text("garbage")
    _write_safetensors(folder / "no-lora.safetensors", {"weight": (2, 2)})
    stem = "lora_unet_input_blocks_4_1_proj_in"
    other = {f"{stem}.lora_down.weight": (4, 640), f"{stem}.lora_up.weight": (640, 4), f"{stem}.alpha": ()}
    _write_safetensors(folder / "of-sdxl.safetensors", other)


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """fp32 zeros of `shapes`."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def _write_stand_ins(folder: Path) -> None:
    (folder / "lib" / "torch").mkdir(parents=True)
    (folder / "lib" / "torch" / "__init__.py").write_text(STAND_IN_TORCH)
    (folder / "lib" / "torch" / "version.py").write_text(STAND_IN_VERSION)
    (folder / "bin").mkdir()
    tool = folder / "bin" / "nvidia-smi"
    tool.write_text(STAND_IN_NVIDIA_SMI)
    tool.chmod(0o755)
