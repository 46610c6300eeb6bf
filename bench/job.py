"""A folder with a full-size Flux.1 of random weights in diffusers' layout, and pictures, to run whole jobs on.

    python -m bench.job FOLDER
    BASE_MODEL=flux MODEL_PATH=FOLDER/model DATASET_NAME=FOLDER/pictures … python -m entrypoint

Needs an accelerator to make the weights on, and 35 GB of disk.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.step import FLUX, free
from trainer.families import family

PICTURES, SIZE = 20, 768
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
T5 = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


def write_model(folder: Path) -> None:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    small = Path(family("flux").FACTS.models["mini-flux"].source)
    for part in ("scheduler", "tokenizer", "tokenizer_2"):
        shutil.copytree(small / part, folder / part)
    shutil.copy(small / "model_index.json", folder)
    for part, length in (("tokenizer", 77), ("tokenizer_2", 512)):
        path = folder / part / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": length}))
    clip = CLIPTextConfig(**CLIP, num_attention_heads=12, projection_dim=768, max_position_embeddings=77)
    parts: dict[str, Any] = {
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(clip),
        "text_encoder_2": lambda: T5EncoderModel(T5Config(**T5)),
        "transformer": lambda: FluxTransformer2DModel(**FLUX),
    }
    torch.set_default_dtype(torch.bfloat16)
    for name, make in parts.items():
        started = time.monotonic()
        torch.manual_seed(0)
        with torch.device("cuda"):
            made = make()
        made.save_pretrained(folder / name)
        del made
        free()
        print(f"{name} {time.monotonic() - started:.1f} s", flush=True)
    torch.set_default_dtype(torch.float32)


def write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
        coarse.resize((SIZE, SIZE)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a picture of zot, number {i}")


def main(arguments: list[str]) -> None:
    write_pictures(Path(arguments[0]) / "pictures")
    write_model(Path(arguments[0]) / "model")


if __name__ == "__main__":
    main(sys.argv[1:])
